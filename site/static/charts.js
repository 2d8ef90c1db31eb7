/* Draws the charts of a page again in the browser, when asked: the same specs, with tooltips and chosen series. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {});
  var here = document.currentScript.src.replace(/charts\.js.*$/, "");
  var LABEL_GAP = 13, drawn = [], waiting = null;

  var ROLES = ["ink", "dim", "grid", "faint", "paper", "1", "2", "3", "4", "5", "6", "7"];

  /* Vega is large and comes only when somebody asks for it. */
  function withVega(ready, failed) {
    if (window.vegaEmbed) return ready();
    if (waiting) return waiting.push([ready, failed]);
    waiting = [[ready, failed]];
    var script = attnbench.make("script", { src: here + "vega.js" });
    script.onload = function () { waiting.forEach(function (pair) { pair[0](); }); waiting = null; };
    script.onerror = function () { waiting.forEach(function (pair) { pair[1](); }); waiting = null; };
    return document.head.appendChild(script);
  }

  /* A spec is in the light colours; charts.css names those, and what stands for them in the theme at hand. */
  function themed(spec) {
    var style = getComputedStyle(document.documentElement), text = JSON.stringify(spec);
    ROLES.forEach(function (role) {
      var from = style.getPropertyValue("--light-" + role).trim(), to = style.getPropertyValue("--chart-" + role).trim();
      if (from && to) text = text.split('"' + from + '"').join('"' + to + '"');
    });
    return JSON.parse(text);
  }

  /* Draws `spec` into the figure in place of what is there; its table follows the same records. */
  function draw(figure, spec) {
    var place = figure.querySelector(".drawing"), holder = attnbench.make("div", { class: "vega" });
    var colourful = themed(spec);
    delete colourful.title;
    withVega(function () {
      window.vegaEmbed(holder, colourful, { mode: "vega-lite", actions: false, renderer: "svg", tooltip: { theme: "custom" } }).then(function () {
        var svg = holder.querySelector("svg");
        svg.setAttribute("class", "chart");
        svg.setAttribute("role", "img");
        svg.setAttribute("aria-label", spec.title + ". " + spec.description);
        svg.style.maxWidth = 1.25 * Number(svg.getAttribute("width")) + "px";
        svg.setAttribute("viewBox", svg.getAttribute("viewBox") || "0 0 " + svg.getAttribute("width") + " " + svg.getAttribute("height"));
        place.replaceChildren(holder);
        figure.classList.add("live");
      }, function () { attnbench.say("This chart could not be drawn."); });
    }, function () { attnbench.say("The script that draws charts could not be loaded; the drawing on the page stays."); });
    remember(figure, spec);
    retable(figure, spec);
  }

  function remember(figure, spec) {
    drawn = drawn.filter(function (item) { return item[0] !== figure; });
    drawn.push([figure, spec]);
  }

  /* ---- the table under a chart: the same rules as in the Python that wrote the first one ---- */

  function number(value, digits) {
    if (value === 0) return "0";
    var rounded = Number(value.toExponential(digits - 1));
    return rounded.toFixed(Math.max(digits - 1 - Math.floor(Math.log10(Math.abs(rounded))), 0));
  }

  function cell(value, first) {
    var text = value, numeric = typeof value === "number";
    if (value === undefined || value === null) { text = "–"; value = ""; numeric = true; }
    else if (typeof value === "boolean") { text = value ? "yes" : "no"; value = Number(value); }
    else if (numeric && !Number.isInteger(value)) text = number(value, 4);
    var attributes = { "data-v": value };
    if (first) attributes.scope = "row";
    else if (numeric) attributes.class = "num";
    return attnbench.make(first ? "th" : "td", attributes, String(text));
  }

  function tableOf(spec) {
    var records = spec.datasets.points, wanted = spec.usermeta;
    if (wanted.columns) {
      return { head: wanted.columns.map(function (c) { return c[1]; }),
        lines: records.map(function (r) { return wanted.columns.map(function (c) { return r[c[0]]; }); }) };
    }
    var lengths = [], names = [], values = {};
    records.forEach(function (r) {
      if (lengths.indexOf(r.x) < 0) lengths.push(r.x);
      if (!values[r.s]) { values[r.s] = {}; names.push(r.s); }
      values[r.s][r.x] = r.y;
    });
    lengths.sort(function (a, b) { return a - b; });
    return { head: ["impl (" + wanted.unit + ")"].concat(lengths.map(function (x) { return wanted.across.toUpperCase() + " = " + x; })),
      lines: names.map(function (s) { return [s].concat(lengths.map(function (x) { return values[s][x]; })); }) };
  }

  function retable(figure, spec) {
    var table = figure.querySelector("details.data table");
    if (!table) return;
    var content = tableOf(spec), make = attnbench.make;
    table.tHead.replaceChildren(make("tr", {}, content.head.map(function (h, i) { return make("th", { scope: "col", class: i ? "num" : null }, h); })));
    table.tBodies[0].replaceChildren.apply(table.tBodies[0], content.lines.map(function (line) {
      return make("tr", {}, line.map(function (value, i) { return cell(value, i === 0); }));
    }));
  }

  /* ---- chosen series ---- */

  /* The spec with `labels` in colour and named beside the plot; the other series stay grey. */
  function choosing(spec, labels) {
    if (!spec.params || !spec.datasets.labels) return spec;
    var copy = JSON.parse(JSON.stringify(spec)), scale = axisOf(copy), height = copy.height, last = {};
    copy.params[0].value = labels;
    copy.datasets.points.forEach(function (r) { if (labels.indexOf(r.s) >= 0 && (!last[r.s] || r.x >= last[r.s].x)) last[r.s] = r; });
    var log = scale.type === "log", low = log ? Math.log(scale.domain[0]) : scale.domain[0], high = log ? Math.log(scale.domain[1]) : scale.domain[1];
    var ends = Object.keys(last).map(function (s) {
      return { s: s, at: height * (1 - ((log ? Math.log(last[s].y) : last[s].y) - low) / (high - low)) };
    }).sort(function (a, b) { return a.at - b.at || (a.s < b.s ? -1 : 1); });
    var places = spread(ends.map(function (e) { return e.at; }), LABEL_GAP, 0, height);
    copy.datasets.labels = ends.map(function (e, i) {
      var value = low + (high - low) * (1 - places[i] / height);
      return { s: e.s, y: log ? Math.exp(value) : value };
    });
    return copy;
  }

  function axisOf(spec) {
    return spec.layer.map(function (layer) { return layer.encoding.y && layer.encoding.y.scale; }).filter(Boolean)[0];
  }

  function spread(places, gap, low, high) {
    var found = places.slice(), i;
    for (i = 1; i < found.length; i++) found[i] = Math.max(found[i], found[i - 1] + gap);
    if (found.length && found[found.length - 1] > high) {
      found[found.length - 1] = high;
      for (i = found.length - 2; i >= 0; i--) found[i] = Math.min(found[i], found[i + 1] - gap);
    }
    var overflow = found.length && found[0] < low ? low - found[0] : 0;
    return found.map(function (place) { return place + overflow; });
  }

  function again() { drawn.forEach(function (item) { draw(item[0], item[1]); }); }

  attnbench.charts = { draw: draw, choosing: choosing, withVega: withVega };

  document.addEventListener("DOMContentLoaded", function () {
    attnbench.all("figure.chart").forEach(function (figure) {
      var button = figure.querySelector("button.interactive"), spec = figure.querySelector("script.spec");
      if (!button || !spec) return;
      button.hidden = false;
      button.addEventListener("click", function () {
        draw(figure, JSON.parse(spec.textContent));
        button.remove();
      });
    });
    document.addEventListener("attnbench-theme", again);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  });
})();
