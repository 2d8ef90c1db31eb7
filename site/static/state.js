/* The state of a page in its address: readable, defaults left out, everything unknown ignored with a notice. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {});

  /* keys: name → { usual: "", allowed: [..] or function(value) → boolean }. */
  function read(keys) {
    var values = {}, ignored = [];
    Object.keys(keys).forEach(function (name) { values[name] = keys[name].usual; });
    location.hash.slice(1).split("&").forEach(function (part) {
      if (!part) return;
      var at = part.indexOf("="), name = decoded(at < 0 ? part : part.slice(0, at));
      var value = at < 0 ? "" : decoded(part.slice(at + 1));
      if (at < 0 && document.getElementById(name)) return;  /* an anchor of this page */
      var key = Object.prototype.hasOwnProperty.call(keys, name) ? keys[name] : null;
      if (key && value !== null && fits(key, value)) values[name] = value;
      else ignored.push(part);
    });
    return { values: values, ignored: ignored };
  }

  function decoded(text) {
    try { return decodeURIComponent(text.replace(/\+/g, " ")); } catch (e) { return null; }
  }

  function fits(key, value) {
    return Array.isArray(key.allowed) ? key.allowed.indexOf(value) >= 0 : key.allowed(value);
  }

  /* Characters that need no escape in a fragment stay as they are: `fwd_bwd`, `1x4096`, `a,b/c`. */
  function encoded(text) {
    return encodeURIComponent(text).replace(/%2C/g, ",").replace(/%2F/g, "/").replace(/%3A/g, ":").replace(/%20/g, "+");
  }

  function fragment(keys, values) {
    return Object.keys(keys).filter(function (name) { return values[name] !== keys[name].usual; })
      .map(function (name) { return name + "=" + encoded(values[name]); }).join("&");
  }

  /* A deliberate choice is a step of the history; typing and sliding replace the step they are on. */
  function write(keys, values, deliberate) {
    var text = fragment(keys, values), here = location.hash.slice(1);
    if (text === here) return;
    var address = location.pathname + location.search + (text ? "#" + text : "");
    if (deliberate) history.pushState(null, "", address);
    else history.replaceState(null, "", address);
  }

  attnbench.state = { read: read, write: write, fragment: fragment };
})();
