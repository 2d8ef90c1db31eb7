/* Explore: selectors choose a sweep, an axis, an error and a length; charts are drawn from precomputed specs. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {});
  var own = document.currentScript.dataset.file, make = attnbench.make;
  var config = JSON.parse(document.getElementById("config").textContent);
  var SWEEP = ["gpu", "workload", "dtype", "dir", "scope", "sw"];
  var PREFER = ["gpu", "dir", "dtype", "workload", "scope", "sw"];
  var loaded = {}, waiting = {}, values = {}, said = [], first = true;

  attnbench.receive = function (file, content) {
    loaded[file] = content;
    (waiting[file] || []).forEach(function (ready) { ready(content); });
    delete waiting[file];
  };

  function withFile(file, ready) {
    if (loaded[file]) return ready(loaded[file]);
    if (waiting[file]) return waiting[file].push(ready);
    waiting[file] = [ready];
    var script = make("script", { src: file });
    script.onerror = function () { delete waiting[file]; notice("The charts of this choice could not be loaded: " + file); };
    return document.head.appendChild(script);
  }

  /* Adds to what is said; the empty text takes it all back. */
  function notice(text) {
    var place = document.getElementById("notice");
    said = text ? said.filter(function (other) { return other !== text; }).concat(text) : [];
    place.textContent = said.join(" ");
    place.hidden = !said.length;
  }

  function keys() {
    var found = {};
    SWEEP.forEach(function (key) {
      found[key] = { usual: config.usual[key], allowed: config.sweeps.map(function (s) { return s[key]; }) };
    });
    found.y = { usual: "time", allowed: options("y") };
    found.err = { usual: config.usual.err, allowed: function () { return true; } };
    found.n = { usual: config.usual.n, allowed: function (v) { return /^\d*$/.test(v); } };
    found.impl = { usual: "", allowed: function () { return true; } };
    return found;
  }

  function select(name) { return document.querySelector('form.selectors select[name="' + name + '"]'); }
  function options(name) { return attnbench.all("option", select(name)).map(function (o) { return o.value; }); }

  /* The sweep that agrees with most of what is chosen; the key changed last is kept in any case. */
  function nearest(wanted, changed) {
    var best = null, most = -1;
    config.sweeps.forEach(function (sweep) {
      if (changed && sweep[changed] !== wanted[changed]) return;
      var score = PREFER.reduce(function (sum, key, i) { return sum + (sweep[key] === wanted[key] ? Math.pow(2, PREFER.length - i) : 0); }, 0);
      if (score > most) { most = score; best = sweep; }
    });
    return best;
  }

  function fill(name, wanted, chosen, words) {
    var box = select(name);
    box.replaceChildren.apply(box, wanted.map(function (value) {
      return make("option", { value: value }, words ? words(value) : value);
    }));
    box.value = wanted.indexOf(chosen) >= 0 ? chosen : wanted[wanted.length - 1];
    return box.value;
  }

  function errorWords(value) {
    return value.indexOf("task:") === 0 ? "score of " + value.slice(5) : config.errors[value] || value;
  }

  function panels(id, specs, labels) {
    var place = document.getElementById(id);
    var figures = specs.map(function (spec, i) {
      var figure = frame(id + "-" + i, spec);
      figure.spec = Object.assign({ config: config.chart }, labels ? attnbench.charts.choosing(spec, labels) : spec);
      return figure;
    });
    if (!figures.length) figures = [make("p", { class: "empty" }, "Nothing was measured for this choice.")];
    place.replaceChildren.apply(place, figures);
    figures.forEach(function (figure) { if (figure.spec) attnbench.charts.draw(figure, figure.spec); });
  }

  function frame(id, spec) {
    return make("figure", { class: "chart", id: id }, [
      make("figcaption", {}, spec.title), make("div", { class: "drawing", tabindex: "0", role: "group", "aria-label": spec.title + ", drawing" }, make("p", { class: "hint" }, "Drawing…")),
      make("details", { class: "data" }, [make("summary", {}, "Show as table"),
        make("div", { class: "frame", tabindex: "0", role: "region", "aria-label": spec.title + ", as table" },
          make("table", {}, [make("caption", { class: "hidden" }, spec.title), make("thead"), make("tbody")]))])]);
  }

  /* Impls as check boxes; what is in the address is drawn in colour, else the usual ones. */
  function boxes(content, chosen) {
    var place = document.querySelector("#impls .boxes");
    place.replaceChildren.apply(place, content.labels.map(function (label) {
      var box = make("input", { type: "checkbox", value: label });
      box.checked = chosen.indexOf(label) >= 0;
      box.addEventListener("change", function () {
        var now = attnbench.all("input:checked", place).map(function (b) { return b.value; });
        values.impl = now.join(",");
        show(true);
      });
      return make("label", {}, [box, " " + label]);
    }));
  }

  function usualLabels(content) {
    var specs = content.curves[values.y] || [], found = [];
    specs.forEach(function (spec) { spec.params[0].value.forEach(function (s) { if (found.indexOf(s) < 0) found.push(s); }); });
    return found;
  }

  function show(deliberate) {
    var sweep = nearest(values);
    var moved = SWEEP.filter(function (key) { return sweep[key] !== values[key]; });
    if (moved.length) notice("Not measured with this choice; shown instead: " + moved.map(function (key) { return sweep[key]; }).join(", ") + ".");
    SWEEP.forEach(function (key) { values[key] = sweep[key]; select(key).value = sweep[key]; });
    withFile(sweep.file, function (content) {
      var wanted = values.impl ? values.impl.split(",") : [], missing = wanted.filter(function (l) { return content.labels.indexOf(l) < 0; });
      var chosen = wanted.filter(function (l) { return content.labels.indexOf(l) >= 0; });
      if (missing.length) notice("Not in this data set: " + missing.join(", ") + ".");
      document.getElementById("setting").textContent = content.title;
      select("y").value = values.y;
      var kinds = Object.keys(content.errors);
      values.err = kinds.length ? fill("err", kinds, values.err, errorWords) : "";
      var lengths = Object.keys(content.errors[values.err] || {});
      values.n = lengths.length ? fill("n", lengths, values.n) : "";
      document.getElementById("live").hidden = true;
      panels("curves", content.curves[values.y] || [], chosen.length ? chosen : null);
      panels("points", (content.errors[values.err] || {})[values.n] || [], null);
      panels("crossings", content.crossings, null);
      boxes(content, chosen.length ? chosen : usualLabels(content));
      attnbench.state.write(keys(), values, deliberate);
    });
  }

  function fromAddress() {
    var read = attnbench.state.read(keys());
    values = read.values;
    notice("");
    if (read.ignored.length) notice("Ignored in the address: " + read.ignored.join(", ") + ".");
    var usual = Object.keys(values).every(function (key) { return values[key] === (config.usual[key] || keys()[key].usual); });
    if (first && usual) {
      first = false;  /* what was drawn while building is what is wanted */
      withFile(own, function (content) { boxes(content, usualLabels(content)); });
      return;
    }
    first = false;
    show(false);
  }

  document.addEventListener("DOMContentLoaded", function () {
    attnbench.all("form.selectors").forEach(function (form) {
      form.hidden = false;
      form.addEventListener("submit", function (event) { event.preventDefault(); });
      form.addEventListener("change", function (event) {
        values[event.target.name] = event.target.value;
        notice("");
        if (SWEEP.indexOf(event.target.name) >= 0) {
          var near = nearest(values, event.target.name);
          var moved = SWEEP.filter(function (key) { return near[key] !== values[key]; });
          if (moved.length) notice("Not measured with this choice; shown instead: " + moved.map(function (key) { return near[key]; }).join(", ") + ".");
          SWEEP.forEach(function (key) { values[key] = near[key]; });
        }
        show(true);
      });
    });
    var impls = document.getElementById("impls"), live = document.getElementById("live");
    live.hidden = false;  /* the drawings of the page, again with tooltips */
    live.addEventListener("click", function () { show(false); });
    impls.hidden = false;
    document.getElementById("usual").addEventListener("click", function () { values.impl = ""; show(true); });
    window.addEventListener("popstate", fromAddress);
    window.addEventListener("hashchange", fromAddress);
    fromAddress();
  });
})();
