"""The charts as Vega-Lite specs: plain functions of points, drawn while building and again in a browser.

A spec carries its numbers in ``datasets``; the table under a chart is made from the same records. Every
series has a colour, a shape and a label beside its line.
"""

from attnbench.site.charts.bars import Profile, coverage, crossings, performance_profile, seeds
from attnbench.site.charts.base import CONFIG, Record, Spec, spread, ticks
from attnbench.site.charts.curves import METRIC, METRICS, Metric, highlighted, scaling
from attnbench.site.charts.timeline import timeline
from attnbench.site.charts.tradeoff import tradeoff

__all__ = [
    "CONFIG",
    "METRIC",
    "METRICS",
    "Metric",
    "Profile",
    "Record",
    "Spec",
    "coverage",
    "crossings",
    "highlighted",
    "performance_profile",
    "scaling",
    "seeds",
    "spread",
    "ticks",
    "timeline",
    "tradeoff",
]
