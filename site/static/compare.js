/* Compare: any two runs, impls or devices, from the timed rows of a device; verdicts by verdict.js. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {}), make = attnbench.make;
  var config = JSON.parse(document.getElementById("config").textContent);
  var devices = Object.keys(config.devices), loaded = {}, waiting = {}, values = {}, first = true;
  var MANY = 500;

  attnbench.receive = function (file, content) {
    loaded[file] = content;
    (waiting[file] || []).forEach(function (ready) { ready(content); });
    delete waiting[file];
  };

  function withDevice(device, ready) {
    var file = config.devices[device].file;
    if (loaded[file]) return ready(loaded[file]);
    if (waiting[file]) return waiting[file].push(ready);
    waiting[file] = [ready];
    var script = make("script", { src: file });
    script.onerror = function () { delete waiting[file]; notice("The rows of " + device + " could not be loaded: " + file); };
    return document.head.appendChild(script);
  }

  function notice(text) {
    var place = document.getElementById("notice");
    place.textContent = text;
    place.hidden = !text;
  }

  function select(name) { return document.querySelector('#compare select[name="' + name + '"]'); }

  function deviceOf(run) {
    return devices.filter(function (d) { return config.devices[d].runs.some(function (r) { return r.id === run; }); })[0];
  }

  function usual() {
    var gpu = deviceOf(config.usual.a) || devices[0];
    return { by: "run", gpu: gpu, a: config.usual.a, b: config.usual.b, v: "" };
  }

  function keys() {
    var found = {}, start = usual(), any = function () { return true; };
    Object.keys(start).forEach(function (name) { found[name] = { usual: start[name], allowed: any }; });
    found.by.allowed = ["run", "impl", "gpu"];
    found.gpu.allowed = devices;
    found.v.allowed = ["", "slower", "faster", "same", "uncertain"];
    return found;
  }

  /* What A and B may be, as [value, text]; runs newest first. */
  function offered() {
    var here = config.devices[values.gpu];
    if (values.by === "gpu") return devices.map(function (d) { return [d, d]; });
    if (values.by === "impl") return here.impls.map(function (l) { return [l, l]; });
    return here.runs.slice().sort(function (x, y) { return x.date < y.date ? 1 : -1; })
      .map(function (r) { return [r.id, r.date.slice(0, 10) + " · " + r.id]; });
  }

  function fill() {
    var found = offered(), known = found.map(function (o) { return o[0]; });
    ["a", "b"].forEach(function (name, i) {
      var box = select(name);
      box.replaceChildren.apply(box, found.map(function (o) { return make("option", { value: o[0] }, o[1]); }));
      var spare = values.by === "run" ? known[Math.min(1 - i, known.length - 1)] : known[Math.min(i, known.length - 1)];
      if (known.indexOf(values[name]) < 0) values[name] = spare === undefined ? "" : spare;
      box.value = values[name];
    });
    select("by").value = values.by;
    select("gpu").value = values.gpu;
    select("v").value = values.v;
    select("gpu").parentNode.hidden = values.by === "gpu" || devices.length < 2;
  }

  /* Rows of one side by key: [{block, us, flags, run, software}]. Of impls and devices the newest run of a case. */
  function side(content, keep, key) {
    var c = content.columns, groups = {};
    for (var i = 0; i < c.us.length; i++) {
      if (!keep(c, i)) continue;
      var name = key(c, i);
      (groups[name] = groups[name] || []).push(i);
    }
    Object.keys(groups).forEach(function (name) {
      var last = groups[name].reduce(function (best, i) {
        return best === null || c.started[i] > c.started[best] ||
          (c.started[i] === c.started[best] && content.runs[c.run[i]].id > content.runs[c.run[best]].id) ? i : best;
      }, null);
      groups[name] = groups[name].filter(function (i) { return c.run[i] === c.run[last]; }).map(function (i) {
        return { block: c.block[i], us: c.us[i], flags: c.flags[i], status: c.status[i], software: content.runs[c.run[i]].software };
      });
    });
    return groups;
  }

  function sides(a, b) {
    if (values.by === "gpu") {
      var byCase = function (content) {
        return side(content, function () { return true; }, function (c, i) { return content.impls[c.impl[i]] + "\n" + words(content, c.case[i]); });
      };
      return [byCase(a), byCase(b)];
    }
    var at = values.by === "run"
      ? function (name) { return a.runs.findIndex(function (r) { return r.id === name; }); }
      : function (name) { return a.impls.indexOf(name); };
    var column = values.by === "run" ? "run" : "impl";
    return [values.a, values.b].map(function (name) {
      var wanted = at(name);
      return side(a, function (c, i) { return c[column][i] === wanted; }, function (c, i) {
        return (values.by === "run" ? a.impls[c.impl[i]] + "\n" : "") + words(a, c.case[i]);
      });
    });
  }

  function words(content, at) {
    var w = content.cases[at], n = w[2], m = w[3];
    return [w[0], w[1], "N=" + n + (m === n || m === null ? "" : " M=" + m), w[4], w[5]].join(" · ") +
      (w[6] === "op" ? "" : " · " + w[6]) + (w[7] ? " · seed " + w[7] : "");
  }

  function pairs(base, head) {
    var other = {};
    head.forEach(function (row) { if (row.us) other[row.block] = row; });
    return base.filter(function (row) { return row.us && other[row.block]; }).sort(function (x, y) { return x.block - y.block; })
      .map(function (row) { return [row.us, other[row.block].us, row.flags !== other[row.block].flags]; });
  }

  function middle(rows) {
    var times = rows.map(function (r) { return r.us; }).filter(Boolean).sort(function (x, y) { return x - y; });
    return times.length ? times[Math.floor(times.length / 2)] : null;
  }

  function worst(rows) {
    var failed = rows.filter(function (row) { return row.status; });
    return failed.length ? failed[0].status : "ok";
  }

  function software(groups) {
    var found = {};
    Object.keys(groups).forEach(function (key) { groups[key].forEach(function (row) { found[row.software] = true; }); });
    return Object.keys(found).sort().join();
  }

  function compared(base, head) {
    var common = Object.keys(base).filter(function (key) { return head[key]; });
    var all = common.map(function (key) { return pairs(base[key], head[key]); });
    var timed = all.filter(function (p) { return p.length; }), verdicts = attnbench.verdict.decideAll(timed, config.rule), at = 0;
    var lines = common.map(function (key, i) {
      var found = all[i].length ? verdicts[at++] : { verdict: "uncertain", ratio: null, lo: null, hi: null, pairs: 0,
        reason: "no times to compare: " + worst(base[key]) + " before and " + worst(head[key]) + " now" };
      var a = middle(base[key]), b = middle(head[key]);
      return { key: key.replace("\n", " · "), a: a, b: b, d: found,
        logs: all[i].map(function (pair) { return Math.log(pair[1] / pair[0]); }), change: found.ratio === null ? (a && b ? b / a : null) : found.ratio };
    });
    lines.sort(function (x, y) {
      function decided(l) { return l.d.verdict === "slower" || l.d.verdict === "faster" ? 0 : 1; }
      function size(l) { return l.change ? Math.abs(Math.log(l.change)) : -1; }
      return decided(x) - decided(y) || size(y) - size(x) || (x.key < y.key ? -1 : 1);
    });
    var notes = ["the two sides were not measured in turns: drift of the machine is part of a difference"];
    if (software(base) !== software(head)) notes.push("different environment: hardware or software changed between the two sides");
    return { lines: lines, notes: notes, onlyA: Object.keys(base).length - common.length, onlyB: Object.keys(head).length - common.length };
  }

  /* As many digits as `half`, half the width of the bounds, supports; else `digits`. */
  function number(value, digits, half) {
    if (value === null) return "–";
    if (half) digits = Math.min(Math.max(Math.floor(Math.log10(Math.abs(value))) - Math.floor(Math.log10(half)) + 2, 2), 5);
    var rounded = Number(value.toExponential(digits - 1));
    return rounded.toFixed(Math.max(digits - 1 - Math.floor(Math.log10(Math.abs(rounded))), 0));
  }

  function badge(verdict) {
    return make("span", { class: "verdict v-" + verdict }, config.signs[verdict].join(" "));
  }

  /* The 95 % interval of too few pairs for a verdict: for orientation, in brackets. */
  function orientation(logs) {
    var k = logs.length;
    if (k < 3) return "–";
    var mean = logs.reduce(function (a, x) { return a + x; }, 0) / k;
    var half = attnbench.verdict.tQuantile(0.975, k - 1) *
      Math.sqrt(logs.reduce(function (a, x) { return a + (x - mean) * (x - mean); }, 0) / (k - 1) / k);
    return "(" + Math.exp(mean - half).toFixed(3) + " – " + Math.exp(mean + half).toFixed(3) + ")";
  }

  function lineOf(l) {
    var d = l.d;
    return make("tr", { "data-verdict": d.verdict }, [
      make("td", { "data-v": d.verdict }, badge(d.verdict)), make("th", { scope: "row" }, l.key),
      make("td", { class: "num" }, number(l.a, 4)), make("td", { class: "num" }, number(l.b, 4)),
      make("td", { class: "num", "data-v": l.change === null ? "" : l.change }, number(l.change, 3, d.lo === null ? 0 : (d.hi - d.lo) / 2)),
      make("td", { class: "num" }, d.lo === null ? orientation(l.logs) : d.lo.toFixed(3) + " – " + d.hi.toFixed(3)),
      make("td", { class: "num" }, d.pairs), make("td", { class: "reason" }, d.reason)]);
  }

  function draw(found) {
    var counts = { faster: 0, slower: 0, same: 0, uncertain: 0 };
    found.lines.forEach(function (l) { counts[l.d.verdict] += 1; });
    var wanted = found.lines.filter(function (l) { return !values.v || l.d.verdict === values.v; });
    var parts = [make("p", { class: "setting" }, ["A ", make("code", {}, values.a), " → B ", make("code", {}, values.b)])];
    found.notes.forEach(function (note) { parts.push(make("p", { class: "notice banner" }, note)); });
    parts.push(make("ul", { class: "counts" }, Object.keys(counts).map(function (v) { return make("li", {}, [badge(v), " " + counts[v]]); })));
    if (!wanted.length) parts.push(make("p", { class: "empty" }, found.lines.length ? "No case has this verdict." : "A and B have no case in common."));
    else {
      var heads = [["verdict"], ["case"], ["A", "µs"], ["B", "µs"], ["B / A", 1], ["99 % bounds", 1], ["pairs", 1], ["why undecided"]];
      var body = make("tbody", {}, wanted.slice(0, MANY).map(lineOf));
      var table = make("table", {}, [make("caption", {}, "Cases, largest decided change first"),
        make("thead", {}, make("tr", {}, heads.map(function (h) {
          return make("th", { scope: "col", class: h[1] ? "num" : null }, typeof h[1] === "string" ? [h[0], make("small", {}, h[1])] : h[0]);
        }))), body]);
      parts.push(make("div", { class: "frame", tabindex: "0", role: "region", "aria-label": "Cases" }, table));
      if (wanted.length > MANY) {
        var more = make("button", { type: "button" }, "Show all " + wanted.length + " cases");
        more.addEventListener("click", function () { body.append.apply(body, wanted.slice(MANY).map(lineOf)); more.remove(); });
        parts.push(more);
      }
      attnbench.table.sortable(table);
    }
    if (found.onlyA || found.onlyB) parts.push(make("p", { class: "hint" }, "Without a partner: " + found.onlyA + " cases only in A, " + found.onlyB + " only in B."));
    parts.push(make("p", { class: "hint" }, "Memory, launches and errors are compared by attnbench compare."));
    var place = document.getElementById("comparison");
    place.replaceChildren.apply(place, parts);
  }

  function show(deliberate) {
    fill();
    attnbench.state.write(keys(), values, deliberate);
    if (!values.a || !values.b) return;
    var from = values.by === "gpu" ? values.a : values.gpu, to = values.by === "gpu" ? values.b : values.gpu;
    withDevice(from, function (a) { withDevice(to, function (b) {
      var both = sides(a, b);
      draw(compared(both[0], both[1]));
    }); });
  }

  function fromAddress() {
    var start = usual(), read = attnbench.state.read(keys());
    values = read.values;
    if (values.by === "run" && deviceOf(values.a)) values.gpu = deviceOf(values.a);
    notice(read.ignored.length ? "Ignored in the address: " + read.ignored.join(", ") + "." : "");
    var asDrawn = Object.keys(start).every(function (name) { return values[name] === start[name]; });
    if (first && asDrawn && config.usual.a) fill();  /* what was drawn while building is what is wanted */
    else show(false);
    first = false;
  }

  document.addEventListener("DOMContentLoaded", function () {
    var form = document.getElementById("compare");
    form.hidden = false;
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("change", function (event) {
      values[event.target.name] = event.target.value;
      if (event.target.name === "by" || event.target.name === "gpu") { values.a = ""; values.b = ""; }
      notice("");
      show(true);
    });
    window.addEventListener("popstate", fromAddress);
    window.addEventListener("hashchange", fromAddress);
    fromAddress();
  });
})();
