"""Estimates as a table and as JSON; both say that nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from attnbench.results.table import Column, Record, Table
from attnbench.results.table import table as build_table

if TYPE_CHECKING:
    from attnbench.harness.estimate.model import Estimate

LABEL: Final = "Modelled by formula from vendors' figures, not measured: no kernel is faster, most slower."


def estimate_table(found: Sequence[Estimate]) -> Table:
    """One line a case."""
    columns = (
        Column("mechanism", lambda r: r["mechanism"], False),
        Column("pattern", lambda r: r["pattern"], False),
        Column("workload", lambda r: r["workload"], False),
        Column("GPU", lambda r: r["gpu"], False),
        Column("dtype", lambda r: r["dtype"], False),
        Column("direction", lambda r: r["direction"], False),
        Column("N", lambda r: str(r["n"])),
        Column("M", lambda r: str(r["m"])),
        Column("GFLOP", _scaled("flops", 1e9)),
        Column("MB moved", _scaled("moved_bytes", 1e6)),
        Column("FLOP/B", _number("intensity")),
        Column("limit", lambda r: r["limit"] or "–", False),
        Column("bound µs", _number("bound_us")),
        Column("softmax µs", _number("dense_us")),
        Column("tiles ×", _number("tile_speedup")),
        Column("tile use", _percent("tile_efficiency")),
        Column("memory GB", _scaled("memory_bytes", 1e9)),
        Column("fits", lambda r: {True: "yes", False: "no", None: "–"}[r["fits"]], False),
    )
    notes = (
        LABEL,
        "tiles ×: bound of the speed-up over dense attention once whole tiles are computed; tile use: share "
        "of the computed pairs that the mask needs.",
    )
    title = f"Modelled bounds of {len(found)} cases"
    return build_table(title, columns, [item.plain() for item in found], notes)


def estimate_json(found: Sequence[Estimate]) -> dict[str, Any]:
    """The same for machines. It has no key of a case: nothing can take it for results."""
    return {"modelled": True, "note": LABEL, "estimates": [item.plain() for item in found]}


def _number(name: str) -> Callable[[Record], str]:
    return lambda record: "–" if record[name] is None else f"{record[name]:.4g}"


def _scaled(name: str, unit: float) -> Callable[[Record], str]:
    return lambda record: f"{record[name] / unit:.4g}"


def _percent(name: str) -> Callable[[Record], str]:
    return lambda record: "–" if record[name] is None else f"{100 * record[name]:.0f} %"
