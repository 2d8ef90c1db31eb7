"""Draws Vega-Lite specs as SVG while the site is built, and makes the script that draws them in a browser.

The one module that needs vl-convert, an optional library.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Final

from attnbench.errors import UsageError
from attnbench.site.palette import themed

Spec = Mapping[str, Any]

SNIPPET: Final = "window.vegaEmbed = vegaEmbed;"
_ID: Final = re.compile(r'(?<=\bid=")[^"]+(?=")')


def svg(spec: Spec, name: str) -> str:
    """The chart as inline SVG: named by title and description, in the colours of the reader's theme.

    ``name`` is unique on its page and becomes part of the ids. Equal arguments give equal bytes. Raises
    UsageError when vl-convert is not installed.
    """
    plain = {key: value for key, value in spec.items() if key not in ("title", "usermeta")}
    drawn = _drawn(json.dumps(plain, allow_nan=False))
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    width, height = _size(drawn)
    names = (
        f'<title id="{name}-t">{html.escape(spec["title"])}</title>'
        f'<desc id="{name}-d">{html.escape(spec["description"])}</desc>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-labelledby="{name}-t" '
        f'aria-describedby="{name}-d" style="max-width:{1.25 * float(width):.0f}px" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">'
    )
    return head + names + themed(_own_ids(body, name))


@lru_cache(maxsize=256)
def _drawn(spec: str) -> str:
    """The SVG of a spec as Vega draws it; the same data set is often built more than once in a process."""
    return str(_library().vegalite_to_svg(spec, allowed_base_urls=[]))


@cache
def bundle() -> bytes:
    """Vega, Vega-Lite and Vega-Embed as one script that sets ``window.vegaEmbed``; about 900 kB."""
    return str(_library().javascript_bundle(SNIPPET)).encode()


@cache
def _library() -> ModuleType:
    try:
        import vl_convert
    except ImportError:
        raise UsageError(
            "charts are drawn by the library vl-convert-python: observed none, expected 1.8 or later; run "
            "pip install 'attnbench[site]'"
        ) from None
    return vl_convert


def _size(drawn: str) -> tuple[str, str]:
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
    if found is None:
        raise ValueError("an SVG without a viewBox: vl-convert has changed its output")
    return found[1], found[2]


def _own_ids(body: str, name: str) -> str:
    """Ids of clip paths, numbered by Vega over all it drew, as ids of this drawing alone."""
    for number, old in enumerate(dict.fromkeys(_ID.findall(body))):
        new = f"{name}-{number}"
        body = body.replace(f'id="{old}"', f'id="{new}"').replace(f"url(#{old})", f"url(#{new})")
    return body
