"""Colours and markers of the figures for papers: safe for colour-blind readers, dark enough for paper."""

from __future__ import annotations

from typing import Final

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B")
"""Okabe and Ito's palette without black (the baseline) and yellow (too light on paper), and a brown."""

MARKERS: Final = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
BLACK, GREY, NOTE = "#1A1A1A", "#C4C4C4", "#6A6A6A"
