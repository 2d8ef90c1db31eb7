"""Colours, marker shapes and the theme of charts: one list for the drawings, the style sheet and the script.

A spec is written in the colours of the light theme; a drawing refers to custom properties of CSS with these
as their fallback, so that one SVG serves both themes. Seven colours that stay apart under all three kinds of
colour blindness are crossed with eleven shapes, so that no series is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

LIGHT: Final = {
    "ink": "#1a1d21",
    "dim": "#59636f",
    "grid": "#e2e6eb",
    "faint": "#b3bbc5",
    "paper": "#fefefe",
    "1": "#1a5fd0",
    "2": "#d46a0c",
    "3": "#17604c",
    "4": "#b02f98",
    "5": "#6b4c08",
    "6": "#b87a6c",
    "7": "#1b2450",
}
DARK: Final = {
    "ink": "#e6eaee",
    "dim": "#9ca7b3",
    "grid": "#2b3239",
    "faint": "#56606b",
    "paper": "#14171b",
    "1": "#5c86ee",
    "2": "#b3820f",
    "3": "#3fe09a",
    "4": "#c2588f",
    "5": "#8cc6ff",
    "6": "#f4e65a",
    "7": "#f3bfc5",
}
SERIES: Final = tuple(LIGHT[str(i)] for i in range(1, 8))
INK, DIM, GRID, FAINT, PAPER = (LIGHT[name] for name in ("ink", "dim", "grid", "faint", "paper"))

SHAPES: Final = (
    *("circle", "square", "triangle-up", "diamond", "triangle-down", "cross"),
    *("triangle-right", "triangle-left", "M0,-1.2L.3,-.3L1.2,0L.3,.3L0,1.2L-.3,.3L-1.2,0L-.3,-.3Z"),
    "M-1,-.45L1,-.45L1,.45L-1,.45Z",
    "M-.45,-1L.45,-1L.45,1L-.45,1Z",
)
"""Marker shapes of Vega, and three paths around the origin: a star and two bars."""


class Look(NamedTuple):
    """How a series is drawn, wherever it is drawn."""

    colour: str
    shape: str


def looks(labels: Iterable[str], baseline: str) -> dict[str, Look]:
    """A look for each label, in the order given; the baseline is drawn in ink.

    The first 77 differ from one another in colour or shape.
    """
    found: dict[str, Look] = {}
    for label in dict.fromkeys(labels):
        place = len(found) - (baseline in found)
        found[label] = (
            Look(INK, "circle")
            if label == baseline
            else Look(SERIES[place % len(SERIES)], SHAPES[(place + 1) % len(SHAPES)])
        )
    return found


def themed(svg: str) -> str:
    """An SVG in the light colours with each replaced by the custom property that stands for it."""
    for name, colour in LIGHT.items():
        svg = svg.replace(f'"{colour}"', f'"var(--chart-{name},{colour})"')
    return svg


def css() -> str:
    """The custom properties of both themes: the system's choice, and the reader's where one was made.

    ``--light-…`` are the colours of the specs themselves: the script replaces them by those of the theme.
    """
    light, dark, fixed = (
        _properties("chart", LIGHT),
        _properties("chart", DARK),
        _properties("light", LIGHT),
    )
    return (
        f":root{{{fixed}{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f":root[data-theme=dark]{{{dark}}}\n"
        f"@media print{{:root:root{{{light}}}}}\n"
    )


def scale(domain: Sequence[str], chosen: dict[str, Look], channel: str) -> dict[str, Any]:
    """The Vega-Lite scale that gives each series its colour or shape."""
    return {"domain": list(domain), "range": [getattr(chosen[label], channel) for label in domain]}


def _properties(prefix: str, colours: dict[str, str]) -> str:
    return "".join(f"--{prefix}-{name}:{colour};" for name, colour in colours.items())
