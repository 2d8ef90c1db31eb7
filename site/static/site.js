/* What every page has: the theme switch, the link to this view, copy buttons. Classic scripts share `attnbench`. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {});

  function all(selector, root) {
    return Array.prototype.slice.call((root || document).querySelectorAll(selector));
  }

  /* An element with attributes and children; texts become text nodes, so nothing from data is ever markup. */
  function make(tag, attributes, children) {
    var element = document.createElement(tag);
    Object.keys(attributes || {}).forEach(function (name) {
      var value = attributes[name];
      if (value === null || value === undefined || value === false) return;
      element.setAttribute(name, value === true ? "" : value);
    });
    [].concat(children === undefined ? [] : children).forEach(function (child) {
      element.appendChild(typeof child === "object" ? child : document.createTextNode(String(child)));
    });
    return element;
  }

  /* Copies text; where the clipboard is out of reach the text is selected in a field instead. */
  function copy(text, button) {
    function done() {
      if (!button.dataset.label) button.dataset.label = button.textContent;
      button.textContent = "Copied";
      clearTimeout(button.timer);
      button.timer = setTimeout(function () { button.textContent = button.dataset.label; }, 1600);
      attnbench.say("Copied to the clipboard.");
    }
    function byHand() {
      var field = make("textarea", { "aria-label": "Text to copy", class: "by-hand" });
      field.value = text;
      button.parentNode.insertBefore(field, button.nextSibling);
      field.select();
      if (document.execCommand && document.execCommand("copy")) { field.remove(); done(); }
    }
    if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(text).then(done, byHand);
    else byHand();
  }

  /* One polite live region for the whole page. */
  var live = make("div", { class: "hidden", role: "status", "aria-live": "polite", id: "spoken" });
  function say(text) { live.textContent = text; }

  function theme() {
    var label = document.getElementById("theme"), root = document.documentElement;
    if (!label) return;
    var select = label.querySelector("select");
    select.value = root.dataset.theme || "auto";
    label.hidden = false;
    select.addEventListener("change", function () {
      if (select.value === "auto") delete root.dataset.theme;
      else root.dataset.theme = select.value;
      try {
        if (select.value === "auto") localStorage.removeItem("attnbench-theme");
        else localStorage.setItem("attnbench-theme", select.value);
      } catch (e) { say("The theme holds for this page only: storage is not available."); }
      document.dispatchEvent(new CustomEvent("attnbench-theme"));
    });
  }

  function copyButtons() {
    var link = document.getElementById("copy-link");
    if (link) {
      link.hidden = false;
      link.addEventListener("click", function () { copy(location.href, link); });
    }
    all("[data-copy]").forEach(function (button) {
      button.hidden = false;
      button.addEventListener("click", function () {
        copy(button.parentNode.querySelector("code").textContent, button);
      });
    });
  }

  /* Cells of a matrix are one stop of the Tab key; arrows move between them. */
  function roving(table) {
    var stops = all("tbody a", table), current = stops[0];
    if (!current) return;
    stops.forEach(function (stop) { stop.tabIndex = -1; });
    current.tabIndex = 0;
    table.addEventListener("focusin", function (event) {
      if (stops.indexOf(event.target) < 0) return;
      current.tabIndex = -1;
      current = event.target;
      current.tabIndex = 0;
    });
    table.addEventListener("keydown", function (event) {
      var step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      var cell = event.target.closest("td,th");
      if (!step || !cell) return;
      event.preventDefault();
      var row = cell.parentNode, column = cell.cellIndex;
      for (;;) {
        column += step[1];
        if (step[0]) row = step[0] > 0 ? row.nextElementSibling : row.previousElementSibling;
        var next = row && row.cells[column];
        if (!next) return;
        var stop = next.querySelector("a");
        if (stop) { stop.focus(); return; }
      }
    });
  }

  attnbench.all = all;
  attnbench.make = make;
  attnbench.copy = copy;
  attnbench.say = say;

  document.addEventListener("DOMContentLoaded", function () {
    document.body.appendChild(live);
    theme();
    copyButtons();
    all("table[data-roving]").forEach(roving);
    all("details.how").forEach(function (details) {
      if (document.documentElement.classList.contains("visited")) details.open = false;
      try { localStorage.setItem("attnbench-visited", "yes"); } catch (e) { /* then every visit is a first one */ }
    });
    document.documentElement.classList.remove("visited");
  });
})();
