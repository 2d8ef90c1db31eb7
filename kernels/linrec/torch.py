"""The linear recurrence in eager PyTorch, in its chunked-parallel form: batched products over all chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.features import feature, guarded
from attnbench.kernels.linrec import State
from attnbench.kernels.linrec._decays import SUB, Decay, VectorGate, scalar_decay, vector_decay
from attnbench.kernels.linrec._scan import delta_scan, scan, scan_by_steps


def linrec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    gv: Tensor | None,
    beta: Tensor | None,
    rule: str,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    eps_mode: str,
    initial_state: State | None,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, State]:
    """Compute by chunks of ``chunk`` steps in fp32 (fp64 for fp64 inputs); every gradient is autograd's.

    Half inputs are promoted first, because states and normalisers are sums that must be fp32;
    ``torch.set_float32_matmul_precision`` decides whether tensor cores serve the products. Extra memory per
    head: N·L scores and N/L states in fp32; a vector gate adds 16·N·D, the delta rule N·(L + Dk + Dv).
    Raises Unsupported for the delta rule with ``gv``.
    """
    if rule == "delta" and gv is not None:
        raise Unsupported("linrec/torch gate gv under the delta rule", "gv given", "gv None")
    vector = gv is not None or (g is not None and g.dim() == 4)
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    parts = Chunking(v.shape[2], _chunk_length(v.shape[2], chunk, vector), q.shape[1], dtype)
    queries, keys = (parts.split(feature(x.to(dtype), feature_map)) for x in (q, k))
    write = None if beta is None else parts.split(beta).unsqueeze(-1)
    if write is not None and rule == "add":
        keys = keys * write
    s0, z0 = _initial(initial_state, v, q, dtype)
    s0, z0 = (x.unflatten(1, (q.shape[1], -1)) for x in (s0, z0))
    run = _Run(queries, keys, parts.gates(g, v.shape[1]), None if gv is None else parts.split(gv), reverse)
    values = parts.split(v)
    o, s = run.read(values, s0) if rule == "add" else run.read_delta(keys, values, write, s0)
    if not normalize:
        o = parts.join(o if scale == 1.0 else scale * o)
        return o.to(v.dtype), State(s.flatten(1, 2), None)
    den, z = run.normalizer(z0)
    o = o / guarded(den, eps, eps_mode)
    return parts.join(o).to(v.dtype), State(s.flatten(1, 2), z.flatten(1, 2))


@dataclass(frozen=True)
class Chunking:
    """The layout (B, Hg, H/Hg, NT, L, …) of n steps in chunks of ``length``, heads in ``groups``."""

    n: int
    length: int
    groups: int
    dtype: torch.dtype

    def split(self, x: Tensor) -> Tensor:
        """From (B, heads, N, …); a short last chunk ends in zeros, which are identity steps."""
        x = x.to(self.dtype)
        if self.n % self.length:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, -self.n % self.length))
        return x.unflatten(2, (-1, self.length)).unflatten(1, (self.groups, -1))

    def join(self, x: Tensor) -> Tensor:
        """Back to (B, H, N, …)."""
        return x.flatten(3, 4).flatten(1, 2)[:, :, : self.n]

    def gates(self, g: Tensor | None, heads: int) -> Tensor | None:
        """Log-gates (…, NT or 1, L) or (…, NT, L, Dk); a constant gate (H,) receives no gradient."""
        if g is None or g.dim() > 1:
            return None if g is None else self.split(g)
        if self.n % self.length:
            return self.split(g.detach().view(1, heads, 1).expand(1, heads, self.n))
        return g.detach().to(self.dtype).view(1, self.groups, -1, 1, 1).expand(-1, -1, -1, 1, self.length)


class _Run:
    """Features and gates of one call by chunks, and what both values and normaliser need of them."""

    def __init__(self, q: Tensor, k: Tensor, g: Tensor | None, gv: Tensor | None, reverse: bool) -> None:
        self.g, self.gv, self.reverse = g, gv, reverse
        self.reads, self.writes = q, k
        self.decay: Decay | None = None
        self.gamma: Tensor | None = None
        self.vector = VectorGate(g, reverse) if g is not None and g.dim() == q.dim() else None
        if g is not None and self.vector is not None:
            self.decay = vector_decay(g, reverse)
        elif g is not None:
            self.gamma, self.decay = scalar_decay(g, reverse)
        self.scores = self._scores(q, k)
        if self.decay is not None:
            self.reads, self.writes = q * self.decay.into, k * self.decay.out

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Products of every reading step and every writing step not after it, decayed: (…, NT, L, L)."""
        if self.vector is not None:
            return self.vector.scores(q, k)
        if self.gamma is not None:
            return q @ k.mT * self.gamma
        return (q @ k.mT).triu() if self.reverse else (q @ k.mT).tril()

    def read(self, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled outputs (…, NT, L, Dv) and the final state (…, Dk, Dv)."""
        if self.gv is None:
            before, final = self._scan(self.writes.mT @ v, initial)
            return self.scores @ v + self.reads @ before, final
        decay = vector_decay(self.gv, self.reverse)
        before, final = self._scan(self.writes.mT @ (v * decay.out), initial, decay.total.unsqueeze(-2))
        near = VectorGate(self.gv, self.reverse).apply(self.scores, v)
        return near + decay.into * (self.reads @ before), final

    def read_delta(self, k: Tensor, v: Tensor, beta: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`read` under the delta rule, by its WY form (arXiv 2406.06484).

        A step of a chunk writes w_r = β_r (v_r − S'ᵀ k_r), and what S' holds of the chunk itself is
        Σ_s (k_r·k_s) decay_rs w_s: one unit triangular system, solved for v and for what reads the state.
        """
        reads = k if self.decay is None else k * self.decay.into
        right = (v, reads) if beta is None else (beta * v, beta * reads)
        lead = torch.broadcast_shapes(*(x.shape[:-1] for x in right))
        system = self._scores(k, k) if beta is None else beta * self._scores(k, k)
        solved = torch.linalg.solve_triangular(
            system.expand(*lead, -1),  # its diagonal is taken for ones
            torch.cat([x.expand(*lead, -1) for x in right], -1),
            upper=self.reverse,
            unitriangular=True,
        )
        u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
        total = None if self.decay is None else self.decay.total.unsqueeze(-1)
        before, written, final = delta_scan(u, w, self.writes, total, initial, self.reverse)
        return self.scores @ written + self.reads @ before, final

    def normalizer(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Denominators (…, NT, L, 1) and the final z (…, Dk)."""
        writes = self.writes.sum(-2).unsqueeze(-1)
        lead = torch.broadcast_shapes(writes.shape[:-3], initial.shape[:-1])
        before, final = self._scan(writes.expand(*lead, *writes.shape[-3:]), initial.unsqueeze(-1))
        den = self.scores.sum(-1, keepdim=True) + (self.reads * before.mT).sum(-1, keepdim=True)
        return den, final.squeeze(-1)

    def _scan(self, writes: Tensor, initial: Tensor, factor_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States before every chunk and after the last, of what the chunks write."""
        if factor_v is None and (self.g is None or self.g.dim() < writes.dim()):
            return scan(writes, None if self.g is None else self.g.sum(-1), initial, self.reverse)
        factor_k = (
            torch.ones_like(writes[..., :1, :1]) if self.decay is None else self.decay.total.unsqueeze(-1)
        )
        return scan_by_steps(
            writes, factor_k if factor_v is None else factor_k * factor_v, initial, self.reverse
        )


def _chunk_length(n: int, chunk: int, vector: bool) -> int:
    """No longer than the sequence; under a vector gate a multiple of its sub-blocks, or one sub-block."""
    length = max(1, min(chunk, n))
    return -(-length // SUB) * SUB if vector and length > SUB else length


def _initial(state: State | None, v: Tensor, q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S_0 (B, H, Dk, Dv) and z_0 (B, H, Dk), zeros where they are not given."""
    b, h, _, dv = v.shape
    s = None if state is None else state.s
    z = None if state is None else state.z
    return (
        v.new_zeros(b, h, q.shape[-1], dv, dtype=dtype) if s is None else s.to(dtype),
        v.new_zeros(b, h, q.shape[-1], dtype=dtype) if z is None else z.to(dtype),
    )
