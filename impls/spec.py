"""What a mechanism declares about itself.

Tests, the command line, the docs and the site read it; nothing is said twice. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """An input beyond x and one context: a second context, weights, labels, a mask, a state.

    ``shape`` names the dimensions: ``"(B, M)"`` is a value per key, ``"(B, N, M)"`` one per pair. The letters
    are B, N (query tokens), M (key tokens), P (tokens of a second context), C, H, Hkv, D, or whole numbers.
    The axis N goes with the queries and M with the keys wherever those are cut, permuted, padded or changed.

    ``synthetic`` names a generator of :mod:`attnbench.impls.synthetic`, or is a function of the same form.
    ``differentiable`` says whether the input gets a gradient (floating point only). ``scope`` says which call
    takes it: ``op`` (attend), ``layer`` (forward) or ``both``.
    """

    name: str
    meaning: str
    shape: str
    synthetic: str | Callable[..., Any]
    differentiable: bool = False
    scope: Literal["both", "op", "layer"] = "both"

    def __post_init__(self) -> None:
        unknown = [d for d in self.dims if d not in DIMENSIONS and not d.isdecimal()]
        if unknown or not self.shape.startswith("(") or not self.shape.endswith(")"):
            raise ValueError(
                f"input {self.name}: observed shape {self.shape!r}, "
                f"expected dimensions out of {', '.join(DIMENSIONS)} and whole numbers, like '(B, M)'"
            )

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions of ``shape``, in order."""
        return tuple(d.strip() for d in self.shape.strip("()").split(",") if d.strip())

    def axis(self, dim: str) -> int | None:
        """Position of the dimension ``dim``, None when the input has none."""
        return self.dims.index(dim) if dim in self.dims else None

    def served_to(self, scope: str) -> bool:
        """Whether the call of ``scope`` (``op`` or ``layer``) takes this input."""
        return self.scope in ("both", scope)


DIMENSIONS = ("B", "N", "M", "P", "C", "H", "Hkv", "D")
Family = Literal["dense", "linear", "sparse", "vision", "cross", "user", "control"]
Kind = Literal["core", "mask", "mixer", "map"]
RowSum = Literal["one", "at_most_one", "free"]
Causality = Literal["strict", "selection_leaky"]
Lengths = Literal["free", "aligned"]
SelectionKind = Literal["", "softmax", "other"]


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
    ``grid_ranks`` — ranks of the grids that the tokens may lie on; 1 is a plain sequence. A mechanism without
    1 is given a folded grid on a plain length.
    ``lengths`` — ``aligned``: in a cross pattern token n of x lies on token n of the context, so M = N.
    ``grid_kv`` — in a cross pattern the keys lie on a grid of their own, given as ``grid_kv``.
    ``selection`` — what is attended to the pairs that ``select`` keeps: ``softmax`` attention with scores
    q·k/√D, as tested against the dense mask, ``other``, or nothing is selected (empty).
    ``forward_only`` — why there is no backward pass; empty where there is one, which is tested.
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
    lengths: Lengths = "free"
    grid_kv: bool = False
    selection: SelectionKind = ""
    grouped_kv: bool = False
    ops: tuple[str, ...] | Mapping[Pattern, tuple[str, ...]] = ()
    hot_loop: str = ""
    backends: tuple[str, ...] = ()
    hyper: tuple[Hyper, ...] = ()
    inputs: tuple[Input, ...] = ()
    deviations: tuple[str, ...] = ()
    forward_only: str = ""
    flops_backend: str = "reference"
    flops_note: str = ""
    test_hyper: Mapping[str, Any] = field(default_factory=dict)
    confidence: Literal["high", "medium", "low"] = "high"

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError(f"spec {self.id}: observed no pattern, expected at least one of NS, CS, NC, CC")
        if not self.flops_backend and not self.flops_note:
            raise ValueError(f"spec {self.id}: no flops_backend, so flops_note must say why")
        names = [*(h.name for h in self.hyper), *(x.name for x in self.inputs)]
        if len(names) != len(set(names)):
            raise ValueError(f"spec {self.id}: a hyper-parameter or an input is declared twice in {names}")

    @property
    def on_tensors(self) -> bool:
        """Whether the mechanism is an operation on q, k, v as well; a mixer is a layer only."""
        return self.kind != "mixer"

    @property
    def on_grid(self) -> bool:
        """Whether the mechanism reads a grid at all."""
        return self.grid_ranks != (1,)

    def served_inputs(self, scope: str) -> tuple[Input, ...]:
        """The inputs that the call of ``scope`` (``op`` or ``layer``) takes."""
        return tuple(x for x in self.inputs if x.served_to(scope))

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
