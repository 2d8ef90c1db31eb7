"""What the first page and the leaderboard share: the case shown first, its slice, the script's settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from attnbench.results.schema import SCHEMA_VERSION
from attnbench.site.figure import inline
from attnbench.site.page import Asset, SiteData
from attnbench.site.views.columns import GROUPS, WITHIN, Column
from attnbench.site.views.selection import KEYS, selectors, state
from attnbench.site.views.slices import DIGITS
from attnbench.site.views.words import DIRECTION_WORDS, DTYPE_WORDS, PATTERN_WORDS


def pages(data: SiteData) -> Iterator[Asset]:
    """The slices and ``data/index.json``."""
    for file in data.slices:
        yield Asset(file.path, file.text.encode())
    index = {
        "schema_version": SCHEMA_VERSION,
        "data_version": data.facts.data_version,
        "newest": data.facts.newest,
        "commits": data.facts.commits,
        "significant_digits": DIGITS,
        "slices": [
            {
                **file.entry,
                "bytes": len(file.text.encode()),
                "sha256": hashlib.sha256(file.text.encode()).hexdigest(),
            }
            for file in data.slices
        ],
    }
    yield Asset("data/index.json", (json.dumps(index, indent=1) + "\n").encode())


def context(data: SiteData, columns: Sequence[Column], script: str) -> dict[str, Any]:
    """What a page with the table of a case needs for its selectors and scripts; there must be a case."""
    chosen = data.default_case
    assert chosen is not None
    here = (chosen.device, chosen.dtype, chosen.direction)
    own = next(f for f in data.slices if (f.device, f.dtype, f.direction) == here)
    config = {
        "columns": [column.plain() for column in columns],
        "groups": GROUPS,
        "within": WITHIN,
        "usual": state(chosen),
        "fields": {key: field for key, (field, _) in KEYS.items()},
        "index": [file.entry for file in data.slices],
        "words": {"pattern": PATTERN_WORDS, "direction": DIRECTION_WORDS, "dtype": DTYPE_WORDS},
    }
    return {
        "selectors": selectors(data.cases, chosen),
        "config": inline(config),
        "slice_file": own.path,
        "script": script,
    }
