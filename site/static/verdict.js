/* The rule of `attnbench compare` (results/compare.py): slower, faster, same or uncertain, from pairs of blocks. */
(function () {
  "use strict";
  var attnbench = (window.attnbench = window.attnbench || {});

  /* P(T <= t) of Student's t for whole degrees of freedom: the finite sums of Abramowitz & Stegun 26.7.3-4. */
  function tCdf(t, freedom) {
    var theta = Math.atan(t / Math.sqrt(freedom)), cos = Math.cos(theta), sin = Math.sin(theta), sum = 0, term, k;
    if (freedom % 2) {
      term = cos;
      for (k = 3; k <= freedom; k += 2) { sum += term; term *= cos * cos * (k - 1) / k; }
      return 0.5 + (theta + sin * sum) / Math.PI;
    }
    term = 1;
    for (k = 2; k <= freedom; k += 2) { sum += term; term *= cos * cos * (k - 1) / k; }
    return 0.5 + sin * sum / 2;
  }

  var quantiles = {};
  function tQuantile(p, freedom) {
    var key = p + "/" + freedom;
    if (quantiles[key] === undefined) {
      var low = 0, high = 1;
      while (tCdf(high, freedom) < p) { low = high; high *= 2; }
      while (high - low > 1e-12 * high) {
        var middle = 0.5 * (low + high);
        if (tCdf(middle, freedom) < p) low = middle; else high = middle;
      }
      quantiles[key] = 0.5 * (low + high);
    }
    return quantiles[key];
  }

  /* pairs: [base µs, head µs, whether a flagged state of the device was on one side only]. */
  function decide(pairs, rule) {
    var used = pairs.filter(function (pair) { return !pair[2]; }), k = used.length;
    var found = { verdict: "uncertain", ratio: null, lo: null, hi: null, pairs: k, dropped: pairs.length - k, pSlower: 1, pFaster: 1, reason: "" };
    if (k < Math.max(rule.min_pairs, 2)) {
      found.reason = k + " usable pairs, expected at least " + rule.min_pairs;
      return found;
    }
    var d = used.map(function (pair) { return Math.log(pair[1] / pair[0]); });
    var mean = d.reduce(function (a, b) { return a + b; }, 0) / k;
    var error = Math.sqrt(d.reduce(function (a, x) { return a + (x - mean) * (x - mean); }, 0) / (k - 1) / k);
    var reach = tQuantile(rule.level, k - 1) * error, lo = mean - reach, hi = mean + reach;
    var delta = Math.log1p(rule.delta), same = Math.log1p(rule.equivalence);
    found.ratio = Math.exp(mean);
    found.lo = Math.exp(lo);
    found.hi = Math.exp(hi);
    found.pSlower = above(mean - delta, error, k);
    found.pFaster = above(-mean - delta, error, k);
    var verdict = lo > delta ? "slower" : hi < -delta ? "faster" : -same < lo && hi < same ? "same" : "uncertain";
    if (verdict === "uncertain") {
      found.reason = "between " + percent(found.lo - 1) + " and " + percent(found.hi - 1);
      return found;
    }
    var agreeing = d.filter(function (x) { return x * mean > 0; }).length;
    if (verdict !== "same" && agreeing < rule.agreement * k) {
      found.reason = verdict + " in " + agreeing + " of " + k + " pairs, expected " + Math.round(100 * rule.agreement) + "%";
      return found;
    }
    found.verdict = verdict;
    return found;
  }

  function above(excess, error, k) {
    if (error === 0) return excess > 0 ? 0 : 1;
    return 1 - tCdf(excess / error, k - 1);
  }

  function percent(x) { return (x < 0 ? "-" : "+") + (100 * Math.abs(x)).toFixed(1) + "%"; }

  /* Verdicts on a family of cases, false discoveries under control (Benjamini and Hochberg 1995). */
  function decideAll(cases, rule) {
    var found = cases.map(function (pairs) { return decide(pairs, rule); });
    [["slower", "pSlower"], ["faster", "pFaster"]].forEach(function (side) {
      var p = found.map(function (f) { return f[side[1]]; }).sort(function (a, b) { return a - b; }), limit = 0;
      p.forEach(function (value, i) { if (value <= rule.false_discovery * (i + 1) / p.length) limit = value; });
      found.forEach(function (f) {
        if (f.verdict !== side[0] || f[side[1]] <= limit) return;
        f.verdict = "uncertain";
        f.reason = side[0] + " alone (p = " + Number(f[side[1]].toPrecision(2)) + "), not among " + found.length + " cases";
      });
    });
    return found;
  }

  attnbench.verdict = { decide: decide, decideAll: decideAll, tCdf: tCdf, tQuantile: tQuantile };
})();
