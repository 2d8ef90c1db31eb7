"""One neighborhood as a user writes it: text in, the tiles that a kernel visits out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attnbench.errors import UsageError
from attnbench.harness.estimate.show import LABEL
from attnbench.harness.estimate.tiles import Axis, broadcast, neighborhood
from attnbench.results.table import Column, Record, Table
from attnbench.results.table import table as build_table

TILES = {1: (128,), 2: (16, 8), 3: (2, 8, 8)}
"""Shape of a tile of 128 tokens by the rank of the grid, where none is given."""

DIGITS = 6
"""Of a number on the command line: tiles are counted one by one."""


def simulate(
    grid: str, window: str, stride: str = "1", dilation: str = "1", tile: str = "", causal: bool = False
) -> dict[str, Any]:
    """Tiles of ``grid`` "30,48,80" under ``window`` "18,24,24"; a single number holds for every axis.

    ``tile`` is "2,8,8" for queries and keys, or "4,8,8/2,8,8". Raises UsageError for what is no number, for
    another rank, and for windows that do not fit.
    """
    lengths = _integers("--grid", grid)
    rank = len(lengths)
    if not tile and rank not in TILES:
        raise UsageError(f"--grid {grid}: observed rank {rank}, expected 1, 2 or 3, or a --tile of that rank")
    queries, _, keys = tile.partition("/")
    query_tile = _integers("--tile", queries) if tile else TILES[rank]
    key_tile = _integers("--tile", keys) if keys else query_tile
    sizes = (
        _all(_integers(name, text), rank)
        for name, text in (("--window", window), ("--stride", stride), ("--dilation", dilation))
    )
    axes = [Axis(n, w, s, d, causal) for n, w, s, d in zip(lengths, *sizes, strict=True)]
    counted = neighborhood(axes, query_tile, key_tile)
    return {
        "grid": list(lengths),
        "window": [axis.window for axis in axes],
        "stride": [axis.stride for axis in axes],
        "dilation": [axis.dilation for axis in axes],
        "causal": causal,
        "query_tile": list(query_tile),
        "key_tile": list(key_tile),
        "tiles_visited": counted.visited,
        "tiles_dense": counted.dense,
        "tile_speedup": counted.speedup,
        "flops_speedup": counted.speedup_flops,
        "tile_efficiency": counted.efficiency,
    }


def to_json(record: Record) -> str:
    """JSON, labelled."""
    return json.dumps({"modelled": True, "note": LABEL, "neighborhood": dict(record)}, indent=2)


def to_table(record: Record) -> Table:
    """A fact a line."""
    facts = [{"what": name.replace("_", " "), "value": value} for name, value in record.items()]
    columns = (Column("what", lambda r: r["what"], False), Column("value", lambda r: _text(r["value"])))
    return build_table("Modelled tiles of a neighborhood", columns, facts, (LABEL,))


def _integers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= DIGITS and int(part) > 0 for part in parts):
        raise UsageError(
            f"{option} {text[:40]!r}: expected positive numbers of at most {DIGITS} digits, separated by "
            "commas, such as 16,8"
        )
    return tuple(map(int, parts))


def _all(values: Sequence[int], rank: int) -> tuple[int, ...]:
    return broadcast(values[0] if len(values) == 1 else values, rank, int)


def _text(value: object) -> str:
    if isinstance(value, list):
        return "×".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
