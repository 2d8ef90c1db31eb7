"""What a mechanism declares about itself.

Tests, the command line, the docs and the site read it; nothing is said twice. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class Pattern(StrEnum):
    """The four attention patterns of the CAB taxonomy (arXiv 2210.07661)."""

    NS = "NS"
    CS = "CS"
    NC = "NC"
    CC = "CC"

    @property
    def causal(self) -> bool:
        """Whether output i may depend on queries (and, in self attention, keys) up to i only."""
        return self in (Pattern.CS, Pattern.CC)

    @property
    def cross(self) -> bool:
        """Whether keys and values come from a second sequence."""
        return self in (Pattern.NC, Pattern.CC)

    @property
    def words(self) -> str:
        """The pattern in words."""
        return f"{'causal' if self.causal else 'noncausal'} {'cross' if self.cross else 'self'}"


@dataclass(frozen=True)
class Paper:
    """Where a mechanism was published. ``arxiv`` is the bare identifier, e.g. ``1706.03762``."""

    title: str
    year: int
    arxiv: str = ""
    venue: str = ""

    @property
    def url(self) -> str:
        """Link to the paper, empty when only a venue is known."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter: its default is the paper's; ``cab`` is the value of CAB's efficiency preset."""

    name: str
    default: Any
    meaning: str
    choices: tuple[Any, ...] = ()
    cab: Any = None


@dataclass(frozen=True)
class Input:
    """An input beyond x and one context. ``synthetic`` names the generator that the harness feeds."""

    name: str
    meaning: str
    shape: str
    synthetic: str


Family = Literal["dense", "linear", "sparse", "vision", "cross", "user", "control"]
Kind = Literal["core", "mask", "mixer", "map"]
RowSum = Literal["one", "at_most_one", "free"]
Causality = Literal["strict", "selection_leaky"]


@dataclass(frozen=True)
class Spec:
    """Everything declared about one mechanism.

    ``exact`` — computes softmax attention (over all keys), so its error must be rounding only.
    ``row_sum`` — what the weights of a row add up to; tested with constant values.
    ``causality`` — whether causality holds for the whole mechanism or only once its selection is frozen.
    ``query_separable`` — output i depends on q_i and (k, v) only: it is CC wherever it is NC.
    ``permutation_invariant`` — permuting (k, v) pairs jointly leaves the noncausal output unchanged.
    ``ops`` — operations of ``kernels`` on the hot path, per pattern or for all; when empty, ``hot_loop``
    says what is there instead (a GEMM, an FFT, a convolution).
    ``linear_in_v`` — the output is linear in v for fixed q and k.
    ``square_heads`` — why Dv must equal D; empty where it need not, which is tested.
    ``padding`` — why a padded key is not as one that is not there; empty where it is, which is tested.
    ``flops_backend`` — the backend whose counted FLOPs equal ``flops()``; when empty, ``flops_note`` says why
    no backend counts what the formula does.
    """

    id: str
    name: str
    family: Family
    kind: Kind
    paper: Paper
    patterns: tuple[Pattern, ...]
    summary: str
    formula: str
    cost: str
    upstream: str = ""
    exact: bool = False
    row_sum: RowSum = "one"
    causality: Causality = "strict"
    stochastic: bool = False
    query_separable: bool = True
    permutation_invariant: bool = True
    linear_in_v: bool = True
    padding: str = ""
    square_heads: str = ""
    grid_ranks: tuple[int, ...] = (1,)
    grouped_kv: bool = False
    ops: tuple[str, ...] | Mapping[Pattern, tuple[str, ...]] = ()
    hot_loop: str = ""
    backends: tuple[str, ...] = ()
    hyper: tuple[Hyper, ...] = ()
    inputs: tuple[Input, ...] = ()
    deviations: tuple[str, ...] = ()
    flops_backend: str = "reference"
    flops_note: str = ""
    test_hyper: Mapping[str, Any] = field(default_factory=dict)
    confidence: Literal["high", "medium", "low"] = "high"

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError(f"spec {self.id}: observed no pattern, expected at least one of NS, CS, NC, CC")
        if not self.flops_backend and not self.flops_note:
            raise ValueError(f"spec {self.id}: no flops_backend, so flops_note must say why")
        names = [h.name for h in self.hyper]
        if len(names) != len(set(names)):
            raise ValueError(f"spec {self.id}: a hyper-parameter is declared twice in {names}")

    def ops_for(self, pattern: Pattern | str) -> tuple[str, ...]:
        """Operations on the hot path under ``pattern``."""
        if isinstance(self.ops, tuple):
            return self.ops
        return self.ops.get(Pattern(pattern), ())

    def default(self, name: str) -> Any:
        """Default of the hyper-parameter ``name``; KeyError when there is none of that name."""
        for hyper in self.hyper:
            if hyper.name == name:
                return hyper.default
        raise KeyError(f"{self.id} has no hyper-parameter {name!r}")

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults overridden by ``given``; ValueError for an unknown name or a value outside the choices."""
        known = {hyper.name: hyper for hyper in self.hyper}
        for name, value in given.items():
            if name not in known:
                raise ValueError(
                    f"{self.id}: unknown hyper-parameter {name!r}, expected one of {sorted(known) or 'none'}"
                )
            choices = known[name].choices
            if choices and value not in choices:
                raise ValueError(
                    f"{self.id}: {name}={value!r}, expected one of {', '.join(map(repr, choices))}"
                )
        return {name: given.get(name, hyper.default) for name, hyper in known.items()}
