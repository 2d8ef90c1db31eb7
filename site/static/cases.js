/* The table of one case: finds it in a slice of the data, draws it, and keeps selectors and address in step. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {});
  var make = attnbench.make, settings = document.getElementById("config"), config = JSON.parse(settings.textContent);
  var MEASURES = ["time", "memory", "work", "fidelity", "selection"];
  var OUTER = ["gpu", "dtype", "dir"], INNER = ["pattern", "workload", "n", "scope", "sw", "seed"];
  var QUIET = ["sw", "seed"];  /* shown only where there is a choice */
  var loaded = {}, waiting = {};

  config.docs = settings.dataset.docs;

  /* ---- data ---- */

  attnbench.receive = function (file, content) {
    loaded[file] = unpacked(content);
    (waiting[file] || []).forEach(function (ready) { ready(loaded[file]); });
    delete waiting[file];
  };

  /* Rows from columns. */
  function unpacked(content) {
    var names = Object.keys(content.numbers), rows = new Array(content.rows);
    for (var i = 0; i < content.rows; i++) {
      var row = {};
      for (var text in content.texts) row[text] = content.texts[text].words[content.texts[text].at[i]];
      for (var j = 0; j < names.length; j++) row[names[j]] = content.numbers[names[j]][i];
      row.seed = String(row.seed);
      row.about = content.impls[row.impl];
      row.old = row.date < content.old_before;
      rows[i] = row;
    }
    return { content: content, rows: rows };
  }

  function slice(values) {
    return config.index.filter(function (entry) {
      return OUTER.every(function (key) { return entry[key] === values[key]; });
    })[0];
  }

  function withSlice(entry, ready) {
    if (loaded[entry.file]) return ready(loaded[entry.file]);
    if (waiting[entry.file]) return waiting[entry.file].push(ready);
    waiting[entry.file] = [ready];
    if (document.querySelector('script[src$="' + entry.file + '"]')) return undefined;
    var script = make("script", { src: entry.file });
    script.onerror = function () { delete waiting[entry.file]; none("The data of this choice could not be loaded: " + entry.file); };
    return document.head.appendChild(script);
  }

  function fieldOf(row, key) { return row[config.fields[key]]; }

  function sameCase(rows, values) {
    var found = rows.filter(function (row) {
      return INNER.every(function (key) { return key === "sw" || fieldOf(row, key) === values[key]; });
    });
    var stack = found.some(function (row) { return row.stack === values.sw; }) ? values.sw : newest(found);
    return found.filter(function (row) { return row.stack === stack; });
  }

  function newest(rows) {
    return rows.reduce(function (best, row) { return !best || row.date > best.date ? row : best; }, null)?.stack;
  }

  /* ---- numbers as text: the same rules as in the Python that drew the first table ---- */

  function number(value, half, digits) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    var magnitude = Math.floor(Math.log10(Math.abs(value)));
    digits = digits || 3;
    if (half) digits = Math.min(Math.max(magnitude - Math.floor(Math.log10(half)) + 2, 2), 5);
    var rounded = Number(value.toExponential(digits - 1));
    return rounded.toFixed(Math.max(digits - 1 - Math.floor(Math.log10(Math.abs(rounded))), 0));
  }

  function unitOf(column, values) {
    var positive = values.filter(function (v) { return typeof v === "number" && v; });
    if (column.units.length < 2) return column.units[0];
    var least = positive.length ? Math.min.apply(null, positive) : 0, best = column.units[0];
    column.units.forEach(function (unit) { if (unit[1] <= least && unit[1] > best[1]) best = unit; });
    return best;
  }

  function rankOf(row) {
    if (row.position === null || row.position === undefined) return "–";
    if (row.best === null || row.best === undefined) return "~" + row.position;
    return row.best === row.last ? String(row.best) : row.best + "–" + row.last;
  }

  /* The value of a column as stored; null where there is none. */
  function valueOf(row, key) {
    if (key === "rank") return row.position;
    if (key === "family") return row.about.family;
    if (row.standing && key in row.standing) return row.standing[key];
    return row[key] === undefined ? null : row[key];
  }

  /* ---- drawing ---- */

  function evidence(row, content) {
    var parts = [row.about.slug, content.slugs.device, content.slugged[row.workload], row.pattern, row.scope,
      content.slugs.dtype, content.slugs.direction, row.size, "s" + row.seed];
    return "run/" + content.runs[row.run] + "/" + row.about.file + "#" + parts.join("_");
  }

  function headCell(column, unit) {
    var children = [column.label], shown = unit[0];
    var docs = config.docs && column.anchor ? config.docs + "#" + column.anchor : "";
    if (docs) {
      var link = make("a", { href: docs, "aria-label": "definition of " + column.label }, shown || "def.");
      children.push(make("small", {}, link));
    } else if (shown) children.push(make("small", {}, shown));
    var kind = (column.numeric ? "num" : "text") + " p" + column.priority;
    return make("th", { scope: "col", class: kind, "data-key": column.key, title: column.doc }, children);
  }

  function badges(row) {
    var found = [];
    if (row.baseline) found.push(["baseline", "what × baseline compares with"]);
    if (row.about.exact) found.push(["exact", "computes softmax attention exactly"]);
    if (row.status === "ok" && row.blocks === 1) found.push(["k=1", "preliminary: a single block, so no rank"]);
    if (row.old) found.push(["old", "measured more than a year before the newest row"]);
    return found.map(function (b) { return make("abbr", { class: "badge", title: b[1] }, b[0]); });
  }

  function nameCell(row) {
    var link = make("a", { class: "impl", href: row.about.page }, [
      make("span", { class: "mech" }, row.about.mechanism), make("span", { class: "backend" }, "/" + row.about.backend)]);
    var children = [link];
    badges(row).forEach(function (badge) { children.push(" ", badge); });
    children.push(make("button", { type: "button", class: "more", "aria-expanded": "false", "aria-label": "more of " + row.impl }, "⋯"));
    return make("th", { scope: "row", class: "text p1", "data-key": "impl", "data-v": row.impl }, children);
  }

  function cell(row, column, unit, most, content) {
    var value = valueOf(row, column.key), children, bar = 0;
    if (typeof value !== "number") children = [value || "–"];
    else if (column.key === "time_us") {
      children = [make("a", { href: evidence(row, content) }, number(value / unit[1], row.half_us ? row.half_us / unit[1] : 0))];
      if (row.half_us) children.push(make("small", {}, "±" + number(100 * row.half_us / value, 0, 2) + " %"));
    } else if (column.group === "profile" && unit[0] === "%") {
      children = [(100 * value).toFixed(0)];
      bar = Math.round(100 * value);
    } else if (column.key === "tflops_effective") {
      children = [number(value / unit[1])];
      bar = most ? Math.round(100 * value / most) : 0;
    } else children = [column.key === "blocks" ? value : number(value / unit[1])];
    return make("td", { class: (column.numeric ? "num" : "text") + " p" + column.priority, "data-key": column.key,
      "data-v": value === null ? "" : value, style: bar ? "--bar:" + bar + "%" : null }, children);
  }

  function isMeasure(column) {
    return MEASURES.indexOf(column.group) >= 0 || column.key === "time_us" || column.key === "ratio";
  }

  function line(row, columns, units, most, content) {
    var failed = row.status !== "ok", spanned = failed ? columns.filter(isMeasure).length : 0, done = false;
    var tr = make("tr", { "data-impl": row.impl, "data-status": row.status, class: failed ? "failed" : row.baseline ? "baseline" : null });
    columns.forEach(function (column, at) {
      if (column.key === "rank") {
        var place = row.position === undefined || row.position === null ? "" : row.position;
        tr.appendChild(make("td", { class: "num p1", "data-key": "rank", "data-v": place }, rankOf(row)));
      } else if (column.key === "impl") tr.appendChild(nameCell(row));
      else if (failed && isMeasure(column)) {
        if (!done) {
          var status = make("b", { class: "status s-" + row.status }, row.status);
          tr.appendChild(make("td", { class: "reason p1", colspan: spanned, "data-v": "" },
            [make("a", { href: evidence(row, content) }, status), " " + row.reason]));
        }
        done = true;
      } else tr.appendChild(cell(row, column, units[at], most, content));
    });
    return tr;
  }

  /* Draws `rows` in `columns` into the table of the page. */
  function draw(rows, columns, content, values, sorted) {
    var table = document.getElementById("cases"), first = rows[0];
    var units = columns.map(function (column) {
      return unitOf(column, rows.map(function (row) { return valueOf(row, column.key); }));
    });
    var most = rows.reduce(function (max, row) { return Math.max(max, row.tflops_effective || 0); }, 0);
    var head = make("tr", {}, columns.map(function (column, at) { return headCell(column, units[at]); }));
    table.tHead.replaceChildren(head);
    var body = document.createDocumentFragment();
    rows.forEach(function (row) { body.appendChild(line(row, columns, units, most, content)); });
    table.tBodies[0].replaceChildren(body);
    var words = config.words, length = first.n === first.m ? "N = " + first.n : "N = " + first.n + ", M = " + first.m;
    var pattern = words.pattern[first.pattern] ? words.pattern[first.pattern] + " (" + first.pattern + ")" : first.pattern;
    var title = [first.workload, pattern, length, words.direction[values.dir] || values.dir, first.scope].join(", ");
    table.caption.replaceChildren(make("span", { class: "what" }, title),
      make("small", {}, [values.gpu, words.dtype[values.dtype] || values.dtype, first.shape].join(" · ")),
      make("small", {}, first.context));
    attnbench.table.sortable(table, sorted);
    var key = values.sort.replace(/^-/, "");
    Array.prototype.forEach.call(head.cells, function (th) {
      if (key && th.dataset.key === key) attnbench.table.sort(table, th, values.sort[0] === "-");
    });
  }

  /* On a phone: the columns that do not fit, as a list under the row. */
  function unfold(button) {
    var tr = button.closest("tr"), table = tr.closest("table"), open = button.getAttribute("aria-expanded") === "true";
    if (open) tr.nextElementSibling.remove();
    else {
      var list = make("dl", { class: "facts" });
      Array.prototype.forEach.call(tr.cells, function (cell) {
        var th = table.tHead.rows[0].querySelector('th[data-key="' + cell.dataset.key + '"]');
        if (!th || cell.offsetParent !== null) return;
        var unit = th.querySelector("small"), name = th.querySelector("button").textContent + (unit ? ", " + unit.textContent : "");
        list.append(make("dt", {}, name), make("dd", {}, cell.textContent));
      });
      tr.after(make("tr", { class: "detail" }, make("td", { colspan: tr.cells.length }, list)));
    }
    button.setAttribute("aria-expanded", String(!open));
  }

  document.addEventListener("click", function (event) {
    var button = event.target.closest("button.more");
    if (button) unfold(button);
  });

  function none(text, link) {
    var place = document.getElementById("none");
    place.replaceChildren.apply(place, [text].concat(link ? [" ", link] : []));
    place.hidden = false;
    document.getElementById("frame").hidden = true;
  }

  function some() {
    document.getElementById("none").hidden = true;
    document.getElementById("frame").hidden = false;
  }

  /* ---- what there is ---- */

  function words(key, value) {
    var table = config.words[config.fields[key]] || {};
    return key === "pattern" || !table[value] ? value : table[value];
  }

  function described(values, keys) {
    return keys.map(function (key) { return key === "n" ? "N = " + values[key] : words(key, values[key]); }).join(" · ");
  }

  function equal(a, b, keys) { return keys.filter(function (key) { return a[key] === b[key]; }).length; }

  /* The case that shares most with what was asked for; of equals the one with the nearest length. */
  function nearest(rows, values) {
    var asked = Math.log(parseInt(values.n, 10) || 1);
    var best = null, score = [-1, 0];
    rows.forEach(function (row) {
      var there = {};
      INNER.forEach(function (key) { there[key] = fieldOf(row, key); });
      var mine = [equal(there, values, INNER), -Math.abs(Math.log(row.n) - asked)];
      if (mine[0] > score[0] || (mine[0] === score[0] && mine[1] > score[1])) { best = there; score = mine; }
    });
    return best;
  }

  function nearestSlice(values) {
    return config.index.reduce(function (best, entry) {
      return !best || equal(entry, values, OUTER) > equal(best, values, OUTER) ? entry : best;
    }, null);
  }

  /* Options that lead to no row, given the others, are dimmed and say so. */
  function dim(values, rows) {
    attnbench.all("#selectors select").forEach(function (select) {
      Array.prototype.forEach.call(select.options, function (option) {
        var asked = Object.assign({}, values);
        asked[select.name] = option.value;
        var there = OUTER.indexOf(select.name) >= 0 ? Boolean(slice(asked))
          : Boolean(rows) && rows.some(function (row) {
            return INNER.every(function (key) { return (key === "sw" && select.name !== "sw") || fieldOf(row, key) === asked[key]; });
          });
        option.classList.toggle("dim", !there);
        if (!option.dataset.text) option.dataset.text = option.textContent;
        option.textContent = option.dataset.text + (there ? "" : " (no rows)");
      });
      if (QUIET.indexOf(select.name) >= 0) {
        var choices = new Set((rows || []).map(function (row) { return fieldOf(row, select.name); }));
        select.parentNode.hidden = choices.size < 2;
      }
    });
  }

  attnbench.cases = {
    config: config, OUTER: OUTER, INNER: INNER, slice: slice, withSlice: withSlice, sameCase: sameCase, draw: draw, none: none,
    some: some, described: described, nearest: nearest, nearestSlice: nearestSlice, dim: dim, number: number, fieldOf: fieldOf,
  };
})();
