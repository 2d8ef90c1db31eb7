/* Narrows the page to one case and sorts tables. Without it every case is on the page, one after another. */
(function () {
  "use strict";
  var form = document.getElementById("selectors");
  var cases = Array.prototype.slice.call(document.querySelectorAll("section.case"));

  function fromHash() {
    var chosen = {};
    location.hash.slice(1).split("&").forEach(function (part) {
      var at = part.indexOf("=");
      if (at > 0) chosen[part.slice(0, at)] = decodeURIComponent(part.slice(at + 1));
    });
    return chosen;
  }

  function show(push) {
    var chosen = {}, any = false;
    Array.prototype.forEach.call(form.elements, function (e) { chosen[e.name] = e.value; });
    cases.forEach(function (section) {
      var fits = Object.keys(chosen).every(function (name) { return section.dataset[name] === chosen[name]; });
      section.hidden = !fits;
      any = any || fits;
    });
    var none = document.getElementById("none");
    none.hidden = any;
    if (!any) none.querySelector("span").textContent = "Available: " + nearest(chosen) + ".";
    var hash = "#" + Object.keys(chosen).map(function (n) { return n + "=" + encodeURIComponent(chosen[n]); }).join("&");
    if (push && hash !== location.hash) history.pushState(null, "", hash);
  }

  function nearest(chosen) {
    var best = null, most = -1;
    cases.forEach(function (section) {
      var equal = Object.keys(chosen).filter(function (n) { return section.dataset[n] === chosen[n]; }).length;
      if (equal > most) { most = equal; best = section; }
    });
    return Object.keys(chosen).map(function (n) { return best.dataset[n]; }).join(" · ");
  }

  function fullest() {
    return cases.reduce(function (best, section) {
      var rows = function (s) { return s.querySelectorAll("tbody tr:not(.failed)").length; };
      return rows(section) > rows(best) ? section : best;
    });
  }

  function select(state) {
    var usual = fullest().dataset;
    Array.prototype.forEach.call(form.elements, function (e) {
      var wanted = state[e.name];
      var known = Array.prototype.some.call(e.options, function (o) { return o.value === wanted; });
      e.value = known ? wanted : usual[e.name];
    });
    show(false);
  }

  function byNumber(a, b) { return isNaN(a) || isNaN(b) ? (a < b ? -1 : a > b ? 1 : 0) : a - b; }

  if (form && cases.length) {
    Array.prototype.forEach.call(form.elements, function (e) {
      var values = {};
      cases.forEach(function (s) { values[s.dataset[e.name]] = true; });
      Object.keys(values).sort(byNumber).forEach(function (value) { e.add(new Option(value, value)); });
      e.addEventListener("change", function () { show(true); });
    });
    form.hidden = false;
    window.addEventListener("popstate", function () { select(fromHash()); });
    select(fromHash());
  }

  function sortBy(table, index, descending) {
    var body = table.tBodies[0];
    Array.prototype.slice.call(body.rows)
      .map(function (row) {
        var cell = row.cells[index];
        var key = cell ? (cell.dataset.sort !== undefined ? cell.dataset.sort : cell.textContent.trim()) : "";
        return { row: row, key: key };
      })
      .sort(function (a, b) {
        if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");
        var order = isNaN(a.key) || isNaN(b.key) ? a.key.localeCompare(b.key) : a.key - b.key;
        return descending ? -order : order;
      })
      .forEach(function (entry) { body.appendChild(entry.row); });
  }

  Array.prototype.forEach.call(document.querySelectorAll("section.case table"), function (table) {
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (th, index) {
      var button = document.createElement("button");
      button.type = "button";
      while (th.firstChild) button.appendChild(th.firstChild);
      th.appendChild(button);
      button.addEventListener("click", function () {
        var descending = th.getAttribute("aria-sort") === "ascending";
        Array.prototype.forEach.call(table.tHead.rows[0].cells, function (c) { c.removeAttribute("aria-sort"); });
        th.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortBy(table, index, descending);
      });
    });
  });
})();
