/* Narrows the list of steps by impl, device and direction; the choice is in the address. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {}), NAMES = ["impl", "gpu", "way"];

  document.addEventListener("DOMContentLoaded", function () {
    var form = document.getElementById("steps-filter"), notice = document.getElementById("notice");
    var items = attnbench.all("ol.steps > li"), keys = {}, ignored = [];
    NAMES.forEach(function (name) {
      var box = form.elements[name];
      keys[name] = { usual: "", allowed: attnbench.all("option", box).map(function (o) { return o.value; }) };
    });

    function show() {
      var left = 0, said = [];
      items.forEach(function (item) {
        item.hidden = !NAMES.every(function (name) { return !form.elements[name].value || item.dataset[name] === form.elements[name].value; });
        left += !item.hidden;
      });
      if (ignored.length) said.push("Ignored in the address: " + ignored.join(", ") + ".");
      if (left !== items.length) said.push(left + " of " + items.length + " steps.");
      notice.textContent = said.join(" ");
      notice.hidden = !said.length;
    }

    function fromAddress() {
      var read = attnbench.state.read(keys);
      ignored = read.ignored;
      NAMES.forEach(function (name) { form.elements[name].value = read.values[name]; });
      show();
    }

    form.hidden = false;
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("change", function () {
      var values = {};
      ignored = [];
      NAMES.forEach(function (name) { values[name] = form.elements[name].value; });
      attnbench.state.write(keys, values, true);
      show();
    });
    window.addEventListener("popstate", fromAddress);
    window.addEventListener("hashchange", fromAddress);
    fromAddress();
  });
})();
