/* The leaderboard: one case with all columns, filters, and the standing of each impl over all cases of the setting. */
(function () {
  "use strict";
  var attnbench = window.attnbench, cases = attnbench.cases, config = cases.config, make = attnbench.make;
  var form = document.getElementById("filters");
  var FACETS = {
    family: ["Family", function (row) { return row.about.family; }],
    softmax: ["Softmax", function (row) { return row.about.exact ? "exact" : "approximate"; }],
    backend: ["Backend", function (row) { return row.about.backend.split(" ")[0]; }],
    status: ["Status", function (row) { return row.status; }],
  };
  var names = Object.keys(FACETS), groups = Object.keys(config.groups), any = { usual: "", allowed: function () { return true; } };
  var listed = function (known) {
    return { usual: "", allowed: function (v) { return v.split(",").every(function (part) { return known.indexOf(part) >= 0; }); } };
  };
  var extra = { q: any, hide: listed(groups), over: { usual: "all", allowed: ["all", "workload"] } };
  names.forEach(function (name) { extra[name] = any; });

  /* ---- standings: coverage, performance profile (Dolan and Moré) and geometric mean, as in site/views/profile.py ---- */

  function settingOf(data, values, stack) {
    var inside = data.rows.filter(function (row) {
      return row.pattern === values.pattern && row.scope === values.scope && row.seed === values.seed && row.stack === stack &&
        (values.over === "all" || row.workload === values.workload);
    });
    var fastest = {}, base = {}, impls = {}, all = {};
    inside.forEach(function (row) {
      var where = row.workload + " " + row.size, mine = (impls[row.impl] = impls[row.impl] || { planned: 0, ok: 0, times: {} });
      all[where] = true;
      mine.planned += 1;
      if (row.status !== "ok") return;
      mine.ok += 1;
      mine.times[where] = row.time_us;
      if (!(fastest[where] <= row.time_us)) fastest[where] = row.time_us;
      if (row.baseline) base[where] = row.time_us;
    });
    var measured = Object.keys(fastest), common = Object.keys(base);
    Object.keys(impls).forEach(function (label) {
      var mine = impls[label];
      mine.coverage = mine.ok / mine.planned;
      config.within.forEach(function (factor) {
        var inTime = measured.filter(function (where) { return mine.times[where] / fastest[where] <= factor; }).length;
        mine["within_" + factor] = measured.length ? inTime / measured.length : 0;
      });
      var complete = common.length && common.every(function (where) { return mine.times[where]; });
      mine.geo_mean = complete ? Math.exp(common.reduce(function (sum, where) {
        return sum + Math.log(base[where] / mine.times[where]);
      }, 0) / common.length) : null;
    });
    return { impls: impls, cases: Object.keys(all), common: common };
  }

  /* ---- filters ---- */

  function chosen(values, name) { return values[name] ? values[name].split(",") : []; }

  function passes(row, values, except) {
    var text = values.q.trim().toLowerCase();
    if (text && row.impl.toLowerCase().indexOf(text) < 0) return false;
    return names.every(function (name) {
      var wanted = chosen(values, name);
      return name === except || !wanted.length || wanted.indexOf(FACETS[name][1](row)) >= 0;
    });
  }

  function chips(name, rows, values) {
    var wanted = chosen(values, name), counts = {};
    rows.forEach(function (row) {
      var value = FACETS[name][1](row);
      counts[value] = (counts[value] || 0) + (passes(row, values, name) ? 1 : 0);
    });
    var known = Object.keys(counts).sort();
    wanted.forEach(function (value) { if (known.indexOf(value) < 0) { known.push(value); counts[value] = 0; } });
    return group(name, FACETS[name][0], known.map(function (value) {
      return chip(name, value, value, wanted.indexOf(value) >= 0, counts[value]);
    }));
  }

  function group(name, label, chips) {
    return make("fieldset", { "data-facet": name }, [make("legend", {}, label), make("div", { class: "chips" }, chips)]);
  }

  function chip(name, value, text, checked, count) {
    var box = make("input", { type: "checkbox", name: name, value: value });
    box.checked = checked;
    var children = [box, make("span", {}, text)];
    if (count !== undefined) children.push(make("small", {}, count));
    return make("label", { class: "chip" + (count === 0 && !checked ? " dim" : "") }, children);
  }

  function controls(rows, values) {
    var focused = document.activeElement && form.contains(document.activeElement) ? document.activeElement : null;
    var again = focused && [focused.name, focused.value, focused.type];
    var search = form.querySelector("input[type=search]");
    if (!search) {
      search = make("input", { type: "search", name: "q", placeholder: "mechanism or backend", autocomplete: "off" });
      form.appendChild(make("label", { class: "search" }, [make("span", {}, "Search"), search]));
      var fold = make("details", { id: "fold" }, [make("summary", {}, "Filters and columns"), make("div", { id: "facets" })]);
      fold.open = window.matchMedia("(min-width: 40rem)").matches;
      form.appendChild(fold);
    }
    if (document.activeElement !== search) search.value = values.q;
    var shown = group("hide", "Columns", groups.map(function (name) {
      return chip("group", name, config.groups[name], chosen(values, "hide").indexOf(name) < 0);
    }));
    var over = group("over", "All cases of", [["all", "all workloads"], ["workload", "this workload"]].map(function (option) {
      var box = make("input", { type: "radio", name: "over", value: option[0] });
      box.checked = values.over === option[0];
      return make("label", { class: "chip" }, [box, make("span", {}, option[1])]);
    }));
    document.getElementById("facets").replaceChildren.apply(document.getElementById("facets"),
      names.map(function (name) { return chips(name, rows, values); }).concat(shown, over));
    if (again && again[2] !== "search") {
      attnbench.all("input", form).some(function (box) {
        return box.name === again[0] && box.value === again[1] && (box.focus(), true);
      });
    }
    form.hidden = false;
  }

  /* ---- the page ---- */

  var current = null;

  function show(data, rows, values, commit) {
    current = { data: data, rows: rows, values: values, commit: commit };
    var setting = settingOf(data, values, rows[0].stack);
    rows.forEach(function (row) { row.standing = setting.impls[row.impl]; });
    controls(rows, values);
    var kept = rows.filter(function (row) { return passes(row, values); });
    var hidden = chosen(values, "hide");
    var columns = config.columns.filter(function (column) { return hidden.indexOf(column.group) < 0; });
    var measured = kept.filter(function (row) { return row.status === "ok"; }).length;
    document.getElementById("shown").textContent = kept.length + " of " + rows.length + " impls, " + measured + " of them measured on this case.";
    var n = setting.cases.length, words = config.words;
    document.getElementById("over-what").textContent = n + (n === 1 ? " case: " : " cases: ") + (words.pattern[values.pattern] || "") +
      " (" + values.pattern + "), " + (words.direction[values.dir] || values.dir) + ", " + values.scope + ", every length" +
      (values.over === "all" ? " and workload" : " of " + values.workload) + " measured on " + values.gpu + " in " + (words.dtype[values.dtype] || values.dtype) + ".";
    document.getElementById("common").textContent = setting.common.join(", ") || "none";
    if (!kept.length) {
      var clear = make("button", { type: "button" }, "Clear the filters");
      clear.addEventListener("click", function () { change({ q: "", family: "", softmax: "", backend: "", status: "" }, true); });
      cases.none("No impl of this case passes the filters.", clear);
      return;
    }
    cases.some();
    cases.draw(kept, columns, data.content, values, function (key, descending) {
      commit({ sort: key === "rank" && !descending ? "" : (descending ? "-" : "") + key }, true);
    });
  }

  function change(changes, deliberate) {
    current.commit(changes, deliberate);
    show(current.data, current.rows, current.values, current.commit);
  }

  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.addEventListener("input", function (event) {
    if (event.target.name === "q") change({ q: event.target.value }, false);
  });
  form.addEventListener("change", function (event) {
    var box = event.target, changes = {};
    if (box.name === "q") return;
    if (box.name === "over") changes.over = box.value;
    else if (box.name === "group") {
      changes.hide = groups.filter(function (group) { return !form.querySelector("input[name=group][value=" + group + "]").checked; }).join(",");
    } else {
      changes[box.name] = attnbench.all("input[name=" + box.name + "]:checked", form).map(function (b) { return b.value; }).join(",");
    }
    change(changes, true);
  });

  attnbench.choose(extra, show);
})();
