/* Choosing a case: selectors, address and history in step, and a way out where there is no row.
   attnbench.choose(extra, shown): `extra` are further keys of the address; `shown(data, rows, values, commit)` draws the
   rows of the case, `commit(changes, deliberate)` is how it changes the state. */
window.attnbench.choose = function (extra, shown) {
  "use strict";
  var attnbench = window.attnbench, cases = attnbench.cases, config = cases.config;
  var form = document.getElementById("selectors"), notice = document.getElementById("notice");
  var keys = {}, values, NAMED = cases.OUTER.concat(cases.INNER.slice(0, 4));

  attnbench.all("select", form).forEach(function (select) {
    keys[select.name] = { usual: config.usual[select.name], allowed: Array.prototype.map.call(select.options, function (o) { return o.value; }) };
  });
  var sortable = config.columns.map(function (column) { return column.key; });
  keys.sort = { usual: "", allowed: function (v) { return sortable.indexOf(v.replace(/^-/, "")) >= 0; } };
  Object.keys(extra).forEach(function (name) { keys[name] = extra[name]; });

  function commit(changes, deliberate) {
    Object.assign(values, changes);
    attnbench.state.write(keys, values, deliberate);
  }

  /* "No rows for …. Nearest available: …", the latter as a link. */
  function dead(closest) {
    var other = Object.assign({}, values, closest);
    var link = attnbench.make("a", { href: "#" + attnbench.state.fragment(keys, other) }, cases.described(other, NAMED));
    cases.none("No rows for " + cases.described(values, NAMED) + ". Nearest available:", link);
  }

  function show() {
    attnbench.all("select", form).forEach(function (select) { select.value = values[select.name]; });
    attnbench.all("[data-keep-state]").forEach(function (link) {
      var shared = {};
      Object.keys(keys).forEach(function (name) { shared[name] = name in config.usual ? values[name] : keys[name].usual; });
      link.hash = attnbench.state.fragment(keys, shared);
    });
    var asked = values, entry = cases.slice(values), other = entry || cases.nearestSlice(values);
    cases.withSlice(other, function (data) {
      if (asked !== values) return;  /* another choice was made while the slice was loading */
      var rows = entry ? cases.sameCase(data.rows, values) : [];
      cases.dim(values, entry ? data.rows : null);
      if (!rows.length) {
        dead(Object.assign({ gpu: other.gpu, dtype: other.dtype, dir: other.dir }, cases.nearest(data.rows, values)));
        return;
      }
      cases.some();
      shown(data, rows, values, commit);
    });
  }

  function fromAddress() {
    var found = attnbench.state.read(keys);
    values = found.values;
    notice.hidden = !found.ignored.length;
    notice.textContent = found.ignored.length ? "Not in this data set, and ignored: " + found.ignored.join(", ") : "";
    show();
  }

  form.hidden = false;
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.addEventListener("change", function (event) {
    values = Object.assign({}, values);
    values[event.target.name] = event.target.value;
    attnbench.state.write(keys, values, true);
    show();
  });
  window.addEventListener("popstate", fromAddress);
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
};
