/* The first page: the table of the chosen case. */
(function () {
  "use strict";
  var attnbench = window.attnbench, cases = attnbench.cases;
  attnbench.choose({}, function (data, rows, values, commit) {
    cases.draw(rows, cases.config.columns, data.content, values, function (key, descending) {
      commit({ sort: key === "rank" && !descending ? "" : (descending ? "-" : "") + key }, true);
    });
  });
})();
