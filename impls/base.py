"""The base class of every mechanism: what a mechanism is given, what it must answer.

A ``core`` mechanism overrides :meth:`Attention.attend`, a ``mask`` mechanism names its options of
:func:`attnbench.kernels.flash`, a ``mixer`` overrides :meth:`Attention.forward`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        self.projections = projections and self.spec.kind in ("core", "mask")
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
        ``spec.inputs``. Returns (B, N, C). Raises UsageError when the context is missing or superfluous.
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

        With ``spec.grouped_kv`` k and v may have Hkv < H heads. Defined for core and mask kinds only.
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
        if case.scope == "op" and spec.kind not in ("core", "mask"):
            return Support(
                False, f"{spec.id} is a {spec.kind}: it is measured as a layer, not as an operation"
            )
        device = "cpu" if case.device == "cpu" else "cuda"
        return available(case.backend, device, getattr(torch, case.dtype))

    @classmethod
    def for_length(cls, n: int, m: int) -> dict[str, Any]:
        """Hyper-parameters that a fixed length determines (a table size); none for most mechanisms."""
        return {}

    def flops(self, n: int, m: int) -> int:
        """Forward FLOPs of ``attend`` (mixers: of ``forward``) for one batch element, a multiply-add as 2."""
        raise UsageError(f"{self.spec.id} does not state its FLOPs: override flops(n, m)")

    def counted_flops(self, n: int, m: int) -> int:
        """FLOPs that ``spec.flops_backend`` executes: :meth:`flops`, unless it computes hidden pairs too.

        What torch's counter is compared with, so that the formula is checked even where a backend masks
        pairs that the mechanism does not need.
        """
        return self.flops(n, m)

    def layer_flops(self, n: int, m: int) -> int:
        """Forward FLOPs of ``forward`` for one batch element: :meth:`flops` and the projections."""
        if self.spec.kind not in ("core", "mask"):
            return self.flops(n, m)
        c, kv = self.embed_dim, self.num_kv_heads * self.head_dim
        return self.flops(n, m) + 2 * (2 * n * c * c + 2 * m * c * kv)

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
    """Softmax attention over a subset of the keys, given as options of :func:`attnbench.kernels.flash`."""

    def mask_options(self, n: int, m: int, device: torch.device) -> Mapping[str, Any]:
        """Options of ``flash`` that describe which keys each query sees (causal, window, q_pos, ...)."""
        raise UsageError(f"{self.spec.id} does not state its mask: override mask_options(n, m, device)")

    def visible(self, n: int, m: int, device: torch.device) -> Tensor:
        """The mask itself, bool (N, M), True where key j is visible to query i. For tests and counting."""
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
        options = self.mask_options(q.shape[2], k.shape[2], q.device)
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
        """Number of visible (query, key) pairs per head, exactly."""
        return int(self.visible(n, m, torch.device("cpu")).sum())

    def flops(self, n: int, m: int) -> int:
        """2·D for the score and 2·D for the value of every visible pair of every head."""
        return 4 * self.num_heads * self.pairs(n, m) * self.head_dim

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * self.num_heads * n * m * self.head_dim


__all__ = [
    "Attention",
    "Case",
    "Grid",
    "MaskAttention",
    "Pattern",
    "Spec",
    "Support",
    "UnsupportedPattern",
]
