/* What must be known before anything is painted, so that nothing jumps: the stored theme (without one the system's choice
   holds), that scripts run, and whether this is a first visit. */
(function () {
  "use strict";
  var root = document.documentElement, stored = null;
  root.classList.add("js");
  try {
    stored = localStorage.getItem("attnbench-theme");
    if (localStorage.getItem("attnbench-visited")) root.classList.add("visited");
  } catch (e) { stored = null; }
  if (stored === "light" || stored === "dark") root.dataset.theme = stored;
})();
