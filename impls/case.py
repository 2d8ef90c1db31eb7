"""One cell of a sweep. The only place where the key of a measurement is defined."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Scope = Literal["op", "layer", "task"]
Direction = Literal["fwd", "fwd_bwd", "train"]


@dataclass(frozen=True)
class Workload:
    """What is attended over, without a length: the shape of one attention layer of a real model.

    ``kv_heads`` is H for multi-head attention and less for grouped or multi-query attention. ``m_per_n`` and
    ``m_fixed`` say how long the keys are in a cross pattern: a fixed number, or a ratio of the queries.
    ``grid_rank`` > 1 means that the tokens lie on a grid, which a length is folded into.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    model: str = ""
    source: str = ""
    grid_rank: int = 1
    m_per_n: float = 1.0
    m_fixed: int | None = None
    n_fixed: int | None = None
    input_dist: str = "gaussian"

    @property
    def width(self) -> int:
        """Model width C = heads × head_dim."""
        return self.heads * self.head_dim

    def keys(self, n: int, pattern: str) -> int:
        """Number of keys M for ``n`` queries: N in self patterns, the workload's own rule in cross ones."""
        if pattern in ("NS", "CS"):
            return n
        return self.m_fixed if self.m_fixed is not None else max(1, round(n * self.m_per_n))


@dataclass(frozen=True)
class Case:
    """impl × pattern × workload × length × dtype × direction × device, as plain values."""

    mechanism: str
    backend: str
    pattern: str
    workload: Workload
    n: int
    m: int
    dtype: str
    direction: Direction
    device: str
    scope: Scope = "op"
    grid: tuple[int, ...] = ()
    hyper: tuple[tuple[str, Any], ...] = ()
    task: str = ""
    seed: int = 0

    @property
    def impl(self) -> str:
        """The impl as users spell it: ``mechanism/backend``."""
        return f"{self.mechanism}/{self.backend}"

    @property
    def geometry(self) -> Literal["", "native", "folded"]:
        """Whether the grid is the workload's own or a sequence folded into one; empty without a grid."""
        if not self.grid:
            return ""
        return "native" if len(self.grid) == self.workload.grid_rank else "folded"

    @property
    def grid_kv(self) -> tuple[int, ...]:
        """The grid of the keys, for mechanisms whose keys have one of their own: M folded like N."""
        return fold(self.m, len(self.grid), (len(self.grid),)) if self.grid else ()

    def key(self) -> str:
        """A stable 16-digit hexadecimal key: equal for equal cases in any process and version of Python."""
        values = asdict(self)
        for descriptive in ("model", "source"):
            values["workload"].pop(descriptive)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def series(self) -> tuple[object, ...]:
        """What the lengths of one scaling curve share: everything but n, m and the grid."""
        return (
            *(self.mechanism, self.backend, self.pattern, self.workload, self.dtype, self.direction),
            *(self.device, self.scope, self.hyper, self.task, self.seed),
        )

    def label(self) -> str:
        """One line for progress bars and messages."""
        if self.task:
            return f"{self.impl} {self.pattern} task {self.task} seed {self.seed}"
        return f"{self.impl} {self.pattern} {self.workload.name} N={self.n} {self.dtype} {self.direction}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a worker process; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """Rebuild a case from :meth:`to_json`'s values after a trip through JSON."""
        return cls(
            **{
                **values,
                "workload": Workload(**values["workload"]),
                "grid": tuple(values["grid"]),
                "hyper": tuple((name, value) for name, value in values["hyper"]),
            }
        )


def fold(n: int, rank: int, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The grid that ``n`` tokens are folded into for a mechanism with grids of ``ranks``; () for a sequence.

    Tokens on a grid of ``rank`` keep it where the mechanism has that rank; others are a sequence to it where
    it has rank 1, and are folded where it has not. The most even factorisation: the sides are as near to
    each other as divisors allow.
    """
    if 1 in ranks and (rank == 1 or rank not in ranks):
        return ()
    wanted = rank if rank in ranks else min(ranks)
    sides: list[int] = []
    for left in range(wanted, 1, -1):
        target = round(n ** (1 / left))
        side = next(d for d in range(max(target, 1), 0, -1) if n % d == 0)
        sides.append(side)
        n //= side
    return (*sides, n)
