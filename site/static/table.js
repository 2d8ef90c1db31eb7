/* Tables: sort by a column, copy as Markdown, LaTeX or CSV. Works on what is in the document, whoever drew it. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {});

  function valueOf(cell) {
    if (!cell) return "";
    return cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent.trim();
  }

  function compare(a, b) {
    var numbers = !isNaN(a) && !isNaN(b);
    return numbers ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  }

  /* The cell under a heading; cells of tables with spans are found by their key. */
  function cellOf(row, th) {
    var key = th.dataset.key;
    if (key === undefined) return row.cells[th.cellIndex];
    for (var i = 0; i < row.cells.length; i++) if (row.cells[i].dataset.key === key) return row.cells[i];
    return null;
  }

  /* Stable; empty cells come last in either direction. */
  function sort(table, th, descending) {
    var body = table.tBodies[0];
    attnbench.all("tr.detail", body).forEach(function (detail) { detail.remove(); });
    attnbench.all("button.more", body).forEach(function (button) { button.setAttribute("aria-expanded", "false"); });
    var rows = Array.prototype.map.call(body.rows, function (row) { return { row: row, v: valueOf(cellOf(row, th)) }; });
    rows.sort(function (x, y) {
      if (x.v === "" || y.v === "") return (x.v === "") - (y.v === "");
      return descending ? compare(y.v, x.v) : compare(x.v, y.v);
    });
    var fragment = document.createDocumentFragment();
    rows.forEach(function (entry) { fragment.appendChild(entry.row); });
    body.appendChild(fragment);
    Array.prototype.forEach.call(table.tHead.rows, function (row) {
      Array.prototype.forEach.call(row.cells, function (cell) { cell.removeAttribute("aria-sort"); });
    });
    th.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }

  /* Puts a button into each heading; `chosen(key, descending)` is called after a click has sorted. */
  function sortable(table, chosen) {
    var heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
    Array.prototype.forEach.call(heads, function (th) {
      if (th.querySelector("button.sort")) return;
      var button = document.createElement("button"), small = th.querySelector("small");
      button.type = "button";
      button.className = "sort";
      Array.prototype.slice.call(th.childNodes).forEach(function (node) {
        if (node !== small) button.appendChild(node);
      });
      th.insertBefore(button, small);
      button.addEventListener("click", function () {
        var descending = th.getAttribute("aria-sort") === "ascending";
        sort(table, th, descending);
        if (chosen) chosen(th.dataset.key, descending);
      });
    });
  }

  /* Headings and rows that can be seen, as texts. A cell over several columns is followed by empty ones. */
  function texts(table, raw) {
    function visible(cell) { return cell.offsetParent !== null && !cell.hidden; }
    function seen(row) { return Array.prototype.filter.call(row.cells, visible); }
    var heads = seen(table.tHead.rows[table.tHead.rows.length - 1]);
    var header = heads.map(function (th) {
      var unit = th.querySelector("small"), button = th.querySelector("button.sort");
      var label = (button || th).firstChild ? (button || th).firstChild.textContent.trim() : "";
      var shown = unit ? unit.textContent.trim() : "";
      if (raw && th.dataset.key) return th.dataset.key;
      return shown && shown !== "def." ? label + " (" + shown + ")" : label;
    });
    var body = Array.prototype.filter.call(table.tBodies[0].rows, visible).filter(function (row) { return !row.classList.contains("detail"); });
    var told = raw && body.some(function (row) { return row.dataset.status; });
    if (told) header.push("status", "reason");
    var rows = body.map(function (row) {
      var line = [], cells = seen(row);
      cells.forEach(function (cell) {
        line.push(raw && cell.dataset.v !== undefined ? cell.dataset.v : plain(cell));
        if (cell.colSpan > 1) for (var i = cells.length; i < heads.length; i++) line.push("");  /* what else it covers */
      });
      if (told) line.push(row.dataset.status, reason(row));
      return line;
    });
    return { caption: table.caption ? plain(table.caption, " · ") : "", header: header, rows: rows, heads: heads };
  }

  /* Why a row has no values, without the status that stands before it. */
  function reason(row) {
    var cell = row.querySelector("td.reason");
    return cell ? plain(cell).slice(row.dataset.status.length).trim() : "";
  }

  function plain(cell, between) {
    return Array.prototype.map.call(cell.childNodes, function (node) { return node.textContent.trim(); })
      .filter(Boolean).join(between || " ").replace(/\s+/g, " ");
  }

  function markdown(table) {
    var found = texts(table, false);
    function line(cells) { return "| " + cells.map(function (c) { return c.replace(/\|/g, "\\|"); }).join(" | ") + " |"; }
    var rule = found.heads.map(function (th) { return th.classList.contains("num") ? "---:" : ":---"; });
    return found.caption + "\n\n" + [line(found.header), line(rule)].concat(found.rows.map(line)).join("\n") + "\n";
  }

  var LATEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "µ": "\\textmu{}",
    "×": "$\\times$", "±": "$\\pm$", "≤": "$\\leq$", "–": "--", "·": "$\\cdot$", "→": "$\\to$" };
  function escaped(text) {
    return text.replace(/[&%$#_{}]/g, "\\$&").replace(/\\(?![&%$#_{}])|[~^µ×±≤–·→]/g, function (c) { return LATEX[c]; });
  }

  function latex(table) {
    var found = texts(table, false);
    function line(cells) { return cells.map(escaped).join(" & ") + " \\\\"; }
    var columns = found.heads.map(function (th) { return th.classList.contains("num") ? "r" : "l"; }).join("");
    return ["\\begin{table}", "\\caption{" + escaped(found.caption) + "}", "\\begin{tabular}{" + columns + "}", "\\toprule",
      line(found.header), "\\midrule"].concat(found.rows.map(line), "\\bottomrule", "\\end{tabular}", "\\end{table}", "").join("\n");
  }

  /* Values as stored, in the units of the schema; what is not known is empty, and status and reason have columns. */
  function csv(table) {
    var found = texts(table, true);
    return [found.header].concat(found.rows).map(function (cells) {
      return cells.map(function (c) { return /[",\n]/.test(c) ? '"' + c.replace(/"/g, '""') + '"' : c; }).join(",");
    }).join("\n") + "\n";
  }

  function exporter(table) {
    var bar = attnbench.make("p", { class: "export" }, "Copy this table as ");
    [["Markdown", markdown], ["LaTeX", latex], ["CSV", csv]].forEach(function (kind) {
      var button = attnbench.make("button", { type: "button", "data-as": kind[0].toLowerCase() }, kind[0]);
      button.addEventListener("click", function () { attnbench.copy(kind[1](table), button); });
      bar.appendChild(button);
    });
    var frame = table.closest(".frame") || table;
    frame.parentNode.insertBefore(bar, frame.nextSibling);
  }

  attnbench.table = { sort: sort, sortable: sortable, markdown: markdown, latex: latex, csv: csv };

  document.addEventListener("DOMContentLoaded", function () {
    attnbench.all("table[data-export]").forEach(exporter);
    attnbench.all("table[data-sortable]").forEach(function (table) { if (!table.dataset.drawn) sortable(table); });
  });
})();
