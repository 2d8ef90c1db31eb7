"""The suite ``context_parallel``: which impls it has, and its cases. Imports no torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal, cast

from attnbench.errors import UsageError
from attnbench.harness.config import Resolved
from attnbench.impls.case import Case, Direction, Workload
from attnbench.tasks import workloads

SUITE: Final = "context_parallel"
RANKS: Final = "ranks"
"""Name, among the hyper-parameters of a case, of the number of processes that compute it together."""

DEFAULT_RANKS: Final = (1, 2)

Layout = Literal["contiguous", "zigzag"]
"""Which tokens a rank has: the r-th part; or the r-th and the r-th last of 2P parts, so that under a causal
mask every rank has as many pairs as any other."""


@dataclass(frozen=True)
class Method:
    """One way to split a mechanism: how causal tokens are laid out, and whether heads are split meanwhile."""

    causal_layout: Layout
    splits_heads: bool
    source: str


METHODS: Final[dict[str, Method]] = {
    "softmax/ring": Method("zigzag", False, "Ring Attention (arXiv 2310.01889)"),
    "softmax/all_gather": Method(
        "zigzag", False, "A Unified View of Long-Sequence Models (arXiv 2302.06218), distributed attention"
    ),
    "softmax/ulysses": Method("contiguous", True, "DeepSpeed-Ulysses (arXiv 2309.14509)"),
    "linear_transformer/state_exchange": Method(
        "contiguous", False, "LASP (arXiv 2404.02882), states gathered as in LASP-2 (arXiv 2502.07563)"
    ),
}
"""Impls of the suite. Their backends are ways to communicate; each rank computes with the mechanism's own."""

WORKLOADS: Final = {"tiny": ("tiny",), "small": ("llama3_8b_prefill",), "paper": ("llama3_8b_prefill",)}
LENGTHS: Final = {"tiny": (256,), "small": (8192, 32768), "paper": (8192, 32768, 131072)}


def cases(resolved: Resolved) -> list[Case]:
    """Every length at every number of ranks, and again times the number of ranks.

    The first gives strong scaling (the same N on more ranks), the second weak scaling (the same N a rank).
    Raises UsageError for an impl that the suite does not have, for hyper-parameters, and for no case at all.
    """
    found = list(_cases(resolved))
    if not found:
        raise UsageError(
            f"nothing to measure: --suite {SUITE} under pattern {', '.join(resolved.patterns)}; expected NS "
            "or CS, one that the workload has"
        )
    return found


def _cases(resolved: Resolved) -> Iterator[Case]:
    request = resolved.request
    if resolved.hyper or request.density:
        raise UsageError(f"--suite {SUITE}: observed --set or --density, expected neither")
    ranks = request.ranks or DEFAULT_RANKS
    for impl in _selected(request.impl):
        mechanism, _, backend = impl.partition("/")
        for name in request.workload or WORKLOADS[request.preset]:
            entry = workloads.entry(name)
            for pattern in ("NS", "CS"):
                if pattern not in resolved.patterns or pattern not in entry.patterns:
                    continue
                for dtype in resolved.dtypes:
                    for direction in resolved.directions:
                        for n, p in _sizes(request.seqlen or LENGTHS[request.preset], ranks):
                            yield Case(
                                mechanism=mechanism,
                                backend=backend,
                                pattern=pattern,
                                workload=entry.workload,
                                n=n,
                                m=n,
                                dtype=dtype,
                                direction=cast(Direction, direction),
                                device=resolved.device,
                                hyper=((RANKS, p),),
                                seed=request.seed,
                            )


def why_not(case: Case) -> str:
    """Why a case of the suite cannot be split; empty when it can."""
    size, method = ranks_of(case), METHODS[case.impl]
    parts = size * (2 if layout_of(case) == "zigzag" else 1)
    if case.n % parts:
        return (
            f"{case.impl} under {case.pattern} on {size} ranks: observed N = {case.n}, "
            f"expected a multiple of {parts}"
        )
    shape: Workload = case.workload
    if method.splits_heads and (shape.heads % size or shape.kv_heads % size):
        return (
            f"{case.impl} on {size} ranks: observed {shape.heads} query and {shape.kv_heads} key heads, "
            f"expected multiples of {size}"
        )
    if case.mechanism != "softmax" and shape.heads != shape.kv_heads:
        return f"{case.impl}: observed {shape.kv_heads} key heads for {shape.heads}, expected as many"
    return ""


def ranks_of(case: Case) -> int:
    """Processes that compute the case together; 0 for a case that is not of this suite."""
    return int(dict(case.hyper).get(RANKS, 0)) if case.impl in METHODS else 0


def layout_of(case: Case) -> Layout:
    """Which tokens a rank has."""
    return METHODS[case.impl].causal_layout if case.pattern == "CS" else "contiguous"


def _selected(selectors: tuple[str, ...]) -> list[str]:
    """Impls of the suite that the selectors mean: all, a mechanism, mechanism/backend, or a glob."""
    found: dict[str, None] = {}
    for selector in selectors:
        wanted = "*" if selector == "all" else selector if "/" in selector else f"{selector}/*"
        matching = [impl for impl in METHODS if fnmatchcase(impl, wanted)]
        if not matching:
            raise UsageError(
                f"--impl {selector!r}: observed nothing such in the suite {SUITE}, expected all or some of "
                f"{', '.join(METHODS)}"
            )
        found |= dict.fromkeys(matching)
    return list(found)


def _sizes(lengths: tuple[int, ...], ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(N, ranks): every length on every number of ranks, and every length a rank; each once, ascending."""
    return sorted({(n * factor, p) for n in lengths for p in ranks for factor in (1, p)})
