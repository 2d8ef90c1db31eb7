"""The base class of every mechanism: what a mechanism is given, what it must answer.

A ``core`` mechanism overrides :meth:`Attention.attend`, a ``mask`` mechanism names its options of
:func:`attnbench.kernels.flash`, a ``mixer`` overrides :meth:`Attention.forward`, a ``map`` transforms the
weights of softmax attention. A sparse ``core`` may instead say what it selects and how that is consumed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.case import Case
from attnbench.impls.spec import Pattern, Spec
from attnbench.kernels import OPS, Support, available, flash, padding_bias

Grid = tuple[int, ...] | None


class UnsupportedPattern(UsageError):
    """A mechanism was asked for a pattern that its definition does not have."""


class Attention(nn.Module):
    """One attention mechanism, from (B, N, C) to (B, N, C).

    Args:
        embed_dim: model width C of queries and output.
        num_heads: query heads H; must divide C.
        pattern: NS, CS, NC or CC; must be one of ``spec.patterns``.
        backend: backend of the operations on the hot path, or ``"auto"``.
        num_kv_heads: key and value heads Hkv; must divide H. Mechanisms without ``spec.grouped_kv`` see
            keys and values repeated to H heads.
        bias: whether the projections have a bias.
        projections: False builds the operation alone, ``attend`` on q, k, v: the ``op`` scope.
        **hyper: hyper-parameters of ``spec.hyper``; the defaults are the paper's.

    Raises:
        UnsupportedPattern: the definition has no such pattern.
        UsageError: a width, a head count, a backend name or a hyper-parameter is wrong.
    """

    spec: ClassVar[Spec]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        pattern: Pattern | str = Pattern.NS,
        backend: str = "auto",
        num_kv_heads: int | None = None,
        bias: bool = True,
        projections: bool = True,
        **hyper: Any,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.pattern = self._checked_pattern(pattern)
        self.backend = self._checked_backend(backend)
        self._check_heads()
        self.head_dim = embed_dim // num_heads
        try:
            self.hp = SimpleNamespace(**self.spec.resolve(hyper))
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.bias = bias
        self.projections = projections and self.spec.on_tensors
        if self.projections:
            kv_dim = self.num_kv_heads * self.head_dim
            self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
            self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias)
            self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias)
            self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.setup()

    def setup(self) -> None:
        """Create the mechanism's own parameters and buffers; called once, after the projections exist."""

    # ---- computing -------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) to itself or, in a cross pattern, to ``context`` (B, M, C).

        ``key_padding_mask`` (B, M) is True where a key is padding. ``inputs`` are the mechanism's
        ``spec.inputs``, and ``grid_kv`` where ``spec.grid_kv``; all reach ``attend`` as keywords.
        Returns (B, N, C). Raises UsageError when the context is missing or superfluous.
        """
        source = self.source(x, context)
        q = self.split(self.q_proj(x), self.num_heads)
        k = self.split(self.k_proj(source), self.num_kv_heads)
        v = self.split(self.v_proj(source), self.num_kv_heads)
        o = self.attend(q, *self.grouped(k, v), grid=grid, key_padding_mask=key_padding_mask, **inputs)
        return self.out_proj(self.join(o))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The operation without projections: q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv) → (B, H, N, Dv).

        With ``spec.grouped_kv`` k and v may have Hkv < H heads. A mixer has none.
        """
        raise UsageError(f"{self.spec.id} is a {self.spec.kind}: it has no attend(q, k, v), call forward(x)")

    def source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Where keys and values come from: the context in a cross pattern, x otherwise."""
        if self.pattern.cross:
            if context is None:
                raise UsageError(
                    f"{self.spec.id} under {self.pattern}: observed no context, expected (B, M, C)"
                )
            return context
        if context is not None:
            raise UsageError(
                f"{self.spec.id} under {self.pattern}: observed a context, expected none: use NC or CC"
            )
        return x

    def grouped(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with as many heads as the mechanism reads."""
        if self.spec.grouped_kv or k.shape[1] == self.num_heads:
            return k, v
        repeats = self.num_heads // k.shape[1]
        return k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)

    @staticmethod
    def split(x: Tensor, heads: int) -> Tensor:
        """(B, N, heads·D) → (B, heads, N, D), a view."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    @staticmethod
    def join(o: Tensor) -> Tensor:
        """(B, H, N, D) → (B, N, H·D)."""
        return o.transpose(1, 2).flatten(-2)

    # ---- answering -------------------------------------------------------------------------------------

    @classmethod
    def backends(cls, pattern: Pattern | str) -> tuple[str, ...]:
        """Backends that this mechanism has under ``pattern``: those that all its operations have.

        A mechanism without an operation of ``kernels`` has ``reference`` and ``torch``, unless its Spec
        lists its own.
        """
        if cls.spec.backends:
            return cls.spec.backends
        ops = cls.spec.ops_for(pattern)
        if not ops:
            return ("reference", "torch")
        return tuple(b for b in OPS[ops[0]].backends if all(b in OPS[op].backends for op in ops))

    @classmethod
    def supports(cls, case: Case) -> Support:
        """Whether ``case`` can be measured, decided without building anything; the reason when not."""
        spec = cls.spec
        if case.pattern not in spec.patterns:
            return Support(
                False, f"{spec.id} has no pattern {case.pattern}: it has {', '.join(spec.patterns)}"
            )
        if case.backend not in cls.backends(case.pattern):
            return Support(False, f"{spec.id} has no backend {case.backend} under {case.pattern}")
        if case.scope == "op" and not spec.on_tensors:
            return Support(
                False, f"{spec.id} is a {spec.kind}: it is measured as a layer, not as an operation"
            )
        if Pattern(case.pattern).cross and spec.lengths == "aligned" and case.n != case.m:
            return Support(
                False,
                f"{spec.id} under {case.pattern} is aligned: token n of x lies on token n of the context; "
                f"observed N = {case.n}, M = {case.m}, expected N = M",
            )
        if case.direction == "fwd_bwd" and spec.forward_only:
            return Support(False, f"{spec.id} has no backward: {spec.forward_only}")
        device = "cpu" if case.device == "cpu" else "cuda"
        return available(case.backend, device, getattr(torch, case.dtype))

    @classmethod
    def for_length(cls, n: int, m: int) -> dict[str, Any]:
        """Hyper-parameters that a fixed length determines (a table size); none for most mechanisms."""
        return {}

    @classmethod
    def at_density(cls, density: float, n: int, m: int, pattern: Pattern) -> Mapping[str, Any] | None:
        """Hyper-parameters with which about the share ``density`` of the visible pairs is kept.

        None for a mechanism without such a choice: it keeps all, or what its scores decide.
        """
        return None

    def flops(self, n: int, m: int) -> int:
        """Forward FLOPs of ``attend`` (mixers: of ``forward``) for one batch element, a multiply-add as 2.

        Where the sides of the grid count, this and the formulas below take ``grid`` (and ``grid_kv``) as
        keywords with default None; :meth:`cost` passes them to those that do.
        """
        raise UsageError(f"{self.spec.id} does not state its FLOPs: override flops(n, m)")

    def counted_flops(self, n: int, m: int) -> int:
        """FLOPs that ``spec.flops_backend`` executes: :meth:`flops`, unless it computes hidden pairs too.

        What torch's counter is compared with, so that the formula is checked even where a backend masks
        pairs that the mechanism does not need.
        """
        return self.flops(n, m)

    def layer_flops(self, n: int, m: int) -> int:
        """Forward FLOPs of ``forward`` for one batch element: :meth:`flops` and the projections."""
        return self.flops(n, m) + self._projection_flops(n, m)

    def _projection_flops(self, n: int, m: int) -> int:
        if not self.spec.on_tensors:
            return 0
        c, kv = self.embed_dim, self.num_kv_heads * self.head_dim
        return 2 * (2 * n * c * c + 2 * m * c * kv)

    def cost(self, what: str, *sizes: int, grid: Grid = None, grid_kv: Grid = None) -> int:
        """``flops``, ``counted_flops``, ``layer_flops`` or ``extra_bytes`` at ``sizes`` on a grid."""
        own = getattr(type(self), what)
        if own is Attention.counted_flops:
            return self.cost("flops", *sizes, grid=grid, grid_kv=grid_kv)
        if own is Attention.layer_flops:
            return self.cost("flops", *sizes, grid=grid, grid_kv=grid_kv) + self._projection_flops(*sizes)
        grids = {"grid": grid, "grid_kv": grid_kv}
        taken = inspect.signature(own).parameters
        value: int = own(self, *sizes, **{name: value for name, value in grids.items() if name in taken})
        return value

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Memory that one batch element needs beyond inputs, output and parameters, by the cost formula."""
        return 0

    # ---- checking --------------------------------------------------------------------------------------

    def _checked_pattern(self, pattern: Pattern | str) -> Pattern:
        try:
            wanted = Pattern(pattern)
        except ValueError:
            raise UsageError(f"unknown pattern {pattern!r}: expected NS, CS, NC or CC") from None
        if wanted not in self.spec.patterns:
            raise UnsupportedPattern(
                f"{self.spec.id} has no pattern {wanted} ({wanted.words}): "
                f"it is defined for {', '.join(self.spec.patterns)}"
            )
        return wanted

    def _checked_backend(self, backend: str) -> str:
        names = self.backends(self.pattern)
        if backend != "auto" and backend not in names:
            raise UsageError(
                f"{self.spec.id} under {self.pattern} has no backend {backend!r}: "
                f"expected auto or one of {', '.join(names)}"
            )
        return backend

    def _check_heads(self) -> None:
        for what, whole, part in (
            ("embed_dim by num_heads", self.embed_dim, self.num_heads),
            ("num_heads by num_kv_heads", self.num_heads, self.num_kv_heads),
        ):
            if part < 1 or whole % part:
                raise UsageError(f"{self.spec.id}: {what} must divide: observed {whole} and {part}")


class MaskAttention(Attention):
    """Softmax attention over a subset of the keys, given as options of :func:`attnbench.kernels.flash`.

    ``mask_options`` and ``visible`` are called with the mechanism's inputs as keywords where there are any,
    and with ``grid`` where it reads one: one on a plain sequence without inputs takes (n, m, device) alone.
    """

    def mask_options(self, n: int, m: int, device: torch.device) -> Mapping[str, Any]:
        """Options of ``flash`` that describe which keys each query sees (causal, window, q_pos, ...)."""
        raise UsageError(f"{self.spec.id} does not state its mask: override mask_options(n, m, device)")

    def visible(self, n: int, m: int, device: torch.device) -> Tensor:
        """The mask, bool, broadcastable to (B, H, N, M), True where key j is visible to query i.

        For tests and counting; (N, M) where it depends on positions only.
        """
        raise UsageError(f"{self.spec.id} does not state its mask: override visible(n, m, device)")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Softmax attention over the visible keys; a row without one is 0."""
        at = {**({"grid": grid} if self.spec.on_grid and grid is not None else {}), **inputs}
        options_of: Callable[..., Mapping[str, Any]] = self.mask_options
        options = options_of(q.shape[2], k.shape[2], q.device, **at)
        o, _ = flash(
            q,
            k,
            v,
            scale=self.scale,
            key_bias=padding_bias(key_padding_mask),
            need_lse=False,
            backend=self.backend,
            **options,
        )
        return o

    @property
    def scale(self) -> float:
        """Multiplier of the scores; 1/√D unless a mechanism says otherwise."""
        return 1.0 / math.sqrt(self.head_dim)

    def pairs(self, n: int, m: int) -> int:
        """Number of visible (query, key) pairs per head, exactly; takes ``grid`` where ``visible`` does."""
        return int(self.visible(n, m, torch.device("cpu")).sum())

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """2·D for the score and 2·D for the value of every visible pair of every head."""
        if type(self).pairs is MaskAttention.pairs and grid is not None:
            see: Callable[..., Tensor] = self.visible
            visible = int(see(n, m, torch.device("cpu"), grid=grid).sum())
        else:
            visible = self.cost("pairs", n, m, grid=grid)
        return 4 * self.num_heads * visible * self.head_dim

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * self.num_heads * n * m * self.head_dim


class SparseAttention(Attention):
    """Attention that first decides which pairs to attend to, then attends to those.

    Override :meth:`select` and :meth:`consume`. The two are timed apart, and a frozen selection tells whether
    a mechanism is causal once it is given. Neither may wait for the device.
    """

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """What is attended to: a :class:`attnbench.kernels.selection.Selection`, or any value like it.

        It must have ``to_dense_mask()``, bool (B or 1, Hs, N, M) with Hs dividing H, True for a pair that is
        kept, before padding and causality; ``density(causal)`` where the dense mask would be too large.
        Constants for autograd: select under ``torch.no_grad()`` or detach.
        """
        raise UsageError(f"{self.spec.id} does not state its selection: override select(q, k)")

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: Any,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the selected pairs: o (B, H, N, Dv) and its natural log-sum-exp (B, H, N), or None.

        With ``spec.selection == "softmax"`` the log-sum-exp is that of the scores q·k/√D that are kept.
        """
        raise UsageError(f"{self.spec.id} does not consume its selection: override consume(q, k, v, s)")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        selection: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Select, then attend to what is selected; a given ``selection`` replaces the first step."""
        common = {"grid": grid, "key_padding_mask": key_padding_mask, **inputs}
        chosen = self.select(q, k, **common) if selection is None else selection
        o, _ = self.consume(q, k, v, chosen, **common)
        return o


class MapAttention(Attention):
    """Softmax attention whose weights are transformed before they meet the values, mostly at inference.

    Override :meth:`transform`, which is the definition. A form that needs no (N, M) map overrides ``attend``
    as well; the contract kit compares the two.
    """

    def transform(
        self,
        weights: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Softmax weights (B, H, N, M) to the weights that are applied, of the same shape."""
        raise UsageError(f"{self.spec.id} does not state its transformation: override transform(weights)")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """transform(softmax(q kᵀ/√D)) v, with the map in memory: 4·B·H·N·M bytes in fp32."""
        weights = softmax_map(q, k, causal=self.pattern is Pattern.CS, key_padding_mask=key_padding_mask)
        applied = self.transform(weights, grid=grid, key_padding_mask=key_padding_mask, **inputs)
        return (applied.to(v.dtype) @ v).to(q.dtype)

    def flops(self, n: int, m: int) -> int:
        """2·D for the score and 2·D for the value of every pair of every head."""
        return 4 * self.num_heads * n * m * self.head_dim


def softmax_map(
    q: Tensor, k: Tensor, *, causal: bool = False, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The map of softmax attention, (B, H, N, M), in fp32 (fp64 for fp64 inputs); a row without a key is 0.

    q (B, H, N, D), k (B, H, M, D); causal: j ≤ i + M − N; ``key_padding_mask`` (B, M), True = padding.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / math.sqrt(q.shape[-1])
    n, m = scores.shape[-2:]
    if causal:
        scores = scores.masked_fill(
            torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1), -torch.inf
        )
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def causal_pairs(n: int, m: int) -> int:
    """Pairs with j ≤ i + M − N: query i sees the first i + 1 + M − N keys, none where that is ≤ 0."""
    seeing = min(n, m)
    return seeing * (m - seeing + 1 + m) // 2


__all__ = [
    "Attention",
    "Case",
    "Grid",
    "MapAttention",
    "MaskAttention",
    "Pattern",
    "SparseAttention",
    "Spec",
    "Support",
    "UnsupportedPattern",
    "causal_pairs",
    "softmax_map",
]
