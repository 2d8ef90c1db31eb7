"""Native sparse attention: compressed keys, the blocks that they point at, and a window, under gates."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.sparse._masked_pool import occupied
from attnbench.impls.spec import Hyper, Input, Paper
from attnbench.kernels import TokenBlocks, flash, padding_bias, token_blocks
from attnbench.kernels.selection import first_blocks, last_blocks, topk

WEIGHTS_AT_ONCE = 2**25
"""Weights on compressed keys that are in memory at the same time while blocks are chosen."""

KeysValues = tuple[Tensor, Tensor]


class NativeSparseAttention(SparseAttention):
    """A gated sum of attention to compressed keys, to the blocks that they point at, and to a window."""

    spec = Spec(
        id="nsa",
        name="Native sparse attention (NSA)",
        family="sparse",
        kind="core",
        paper=Paper(
            "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
            2025,
            arxiv="2502.11089",
            venue="ACL 2025",
        ),
        upstream="fla-org/native-sparse-attention; XunhaoLai/native-sparse-attention-triton",
        patterns=(Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Attention to compressed keys finds the blocks that matter; both and a window are summed "
        "under learnt gates.",
        formula="o_t = g₁ softmax(q K_cᵀ)V_c + g₂ softmax over the n blocks with the largest "
        "Σ_{group, i} c_ij p^c_t[i] + g₃ softmax over t − j < w; K_c = φ(k_{id} … k_{id+l−1})",
        cost="4·H·N·D·(N/(2d) + n·l' + w) FLOPs and the compression; Hkv·N·n·4 bytes of lists",
        permutation_invariant=False,
        linear_in_v=False,
        row_sum="free",
        square_heads="compressed values are D numbers computed from l·D",
        grouped_kv=True,
        selection="other",
        ops=("flash", "token_blocks"),
        hyper=(
            Hyper("length", 32, "tokens l of a compressed key, a multiple of the stride"),
            Hyper("stride", 16, "tokens d between the starts of compressed keys"),
            Hyper("block", 64, "keys l' of a selected block, a multiple of the stride"),
            Hyper("top_n", 16, "selected blocks n of a query, forced ones among them"),
            Hyper("num_initial", 1, "first blocks that are always selected"),
            Hyper("num_local", 2, "last blocks up to the query that are always selected (CS)"),
            Hyper("window", 512, "newest keys w of the window (CS)"),
            Hyper(
                "compress",
                "linear",
                "φ: the mean, a weighted sum per head, or a linear map of l·D numbers to D that starts as "
                "the mean",
                choices=("linear", "weighted", "mean"),
            ),
            Hyper("separate_kv", False, "keys and values of each branch from projections of their own"),
        ),
        inputs=(
            Input(
                "gates",
                "weights of the compressed, the selected and the window branch",
                "(B, H, N, 3)",
                "uniform",
                differentiable=True,
                scope="op",
            ),
        ),
        test_hyper={
            "length": 4,
            "stride": 2,
            "block": 4,
            "top_n": 3,
            "num_initial": 1,
            "num_local": 1,
            "window": 5,
        },
        padding="blocks are counted in positions, which dropping a key shifts",
        deviations=(
            "Projections are shared by the branches unless separate_kv, as in the released kernels; the "
            "paper's have their own.",
            "The weight of a compressed key counts for a block once per stride that they share; the "
            "paper's formula runs over the same terms from the end.",
            "NC and CC are ours: everything is visible and there is no window branch.",
            "A compressed key reads padded tokens as zeros and is removed if it reads nothing else.",
        ),
    )

    def setup(self) -> None:
        """Create the compressors of keys and values, their position codes and the gate."""
        hp = self.hp
        sizes, forced = (hp.length, hp.stride, hp.block, hp.top_n, hp.window), (hp.num_initial, hp.num_local)
        if min(sizes) < 1 or min(forced) < 0:
            raise UsageError(
                f"nsa: observed length, stride, block, top_n, window = {sizes} and {forced} forced blocks, "
                "expected positive numbers and none below 0"
            )
        if hp.length % hp.stride or hp.block % hp.stride:
            raise UsageError(
                f"nsa: observed length={hp.length}, block={hp.block}, stride={hp.stride}, "
                "expected multiples of the stride"
            )
        h, d = self.num_kv_heads, self.head_dim
        self.k_position, self.v_position = (nn.Parameter(torch.zeros(h, hp.length, d)) for _ in range(2))
        if hp.compress == "linear":
            start = (torch.eye(d).repeat(hp.length, 1) / hp.length).expand(h, -1, -1)
        else:
            start = torch.full((h, hp.length), 1.0 / hp.length)
        learnt = hp.compress != "mean"
        self.k_compress = nn.Parameter(start.clone()) if learnt else None
        self.v_compress = nn.Parameter(start.clone()) if learnt else None
        if self.projections:
            self.gate_proj = nn.Linear(self.embed_dim, 3 * self.num_heads)
            if hp.separate_kv:
                for name in ("k_proj", "v_proj"):
                    setattr(self, name, nn.Linear(self.embed_dim, 3 * h * d, bias=self.bias))

    @property
    def _causal(self) -> bool:
        return self.pattern is Pattern.CS

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) to itself or to ``context`` (B, M, C) → (B, N, C); gates come from x."""
        source = self.source(x, context)
        q = self.split(self.q_proj(x), self.num_heads)
        k, v = self.k_proj(source), self.v_proj(source)
        parts = 3 if self.hp.separate_kv else 1
        pairs = [
            (self.split(a, self.num_kv_heads), self.split(b, self.num_kv_heads))
            for a, b in zip(k.chunk(parts, -1), v.chunk(parts, -1), strict=True)
        ]
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (self.num_heads, 3)).transpose(1, 2)
        branches = pairs if parts == 3 else pairs * 3
        return self.out_proj(self.join(self._attend(q, branches, gates, key_padding_mask, None)))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        selection: Any = None,
        gates: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The gated sum of the three branches, all from k and v; ``gates`` (B, H, N, 3)."""
        return self._attend(q, [(k, v)] * 3, gates, key_padding_mask, selection)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> TokenBlocks:
        """The key blocks of every query, one list for all query heads of a key head."""
        with torch.no_grad():
            found = self._attend_compressed(q, k, k, key_padding_mask)
            return self._important(q, k.shape[2], found, key_padding_mask)

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: TokenBlocks,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        gates: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The gated sum with given blocks; a sum of several softmaxes has no log-sum-exp."""
        return self._attend(q, [(k, v)] * 3, gates, key_padding_mask, selection), None

    def _attend(
        self,
        q: Tensor,
        branches: list[KeysValues],
        gates: Tensor | None,
        padded: Tensor | None,
        selection: TokenBlocks | None,
    ) -> Tensor:
        """The gated sum for keys and values of the compressed, the selected and the window branch."""
        if gates is None:
            raise UsageError("nsa: observed no gates, expected gates (B, H, N, 3)")
        compressed, (k, v), (window_k, window_v) = branches
        g = gates.unsqueeze(-2).unbind(-1)  # three of (B, H, N, 1)
        bias = padding_bias(padded)
        found = self._attend_compressed(q, *compressed, padded)
        if selection is None:
            with torch.no_grad():
                selection = self._important(q, k.shape[2], found, padded)
        o, _ = token_blocks(q, k, v, selection, causal=self._causal, key_bias=bias, backend=self.backend)
        o = g[1] * o
        if found is not None:
            o = o + g[0] * found[0]
        if self._causal:
            near, _ = flash(
                q,
                window_k,
                window_v,
                causal=True,
                window=(self.hp.window - 1, 0),
                key_bias=bias,
                need_lse=False,
                backend=self.backend,
            )
            o = o + g[2] * near
        return o

    # ---- the compressed branch -------------------------------------------------------------------------

    def _attend_compressed(
        self, q: Tensor, k: Tensor, v: Tensor, padded: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Output (B, H, N, D), lse (B, H, N) and the compressed keys (B, Hkv, n_c, D); None without any."""
        if k.shape[2] < self.hp.length:
            return None
        if padded is not None:
            k, v = (x.masked_fill(padded[:, None, :, None], 0.0) for x in (k, v))
        keys = self._compressed(k, self.k_position, self.k_compress)
        values = self._compressed(v, self.v_position, self.v_compress)
        options: dict[str, Any] = {}
        if self._causal:
            options = {"causal": True, "q_pos": self._last_compressed(q.shape[2], q.device)}
        bias = padding_bias(self._unread(padded))
        o, lse = flash(q, keys, values, key_bias=bias, backend=self.backend, **options)
        assert lse is not None  # need_lse is True by default
        return o, lse, keys

    def _compressed(self, x: Tensor, position: Tensor, weight: Tensor | None) -> Tensor:
        """φ of the windows of l tokens at every d-th token of x (B, Hkv, M, D), with position codes."""
        windows = x.unfold(2, self.hp.length, self.hp.stride).transpose(-1, -2) + position.unsqueeze(1)
        if weight is None:
            return windows.mean(-2)
        if self.hp.compress == "weighted":
            return (weight.unsqueeze(1).unsqueeze(-1) * windows).sum(-2)
        return windows.flatten(-2) @ weight

    def _unread(self, padded: Tensor | None) -> Tensor | None:
        """(B, n_c) bool: compressed keys that read padded tokens only."""
        return None if padded is None else padded.unfold(1, self.hp.length, self.hp.stride).all(-1)

    def _last_compressed(self, n: int, device: torch.device) -> Tensor:
        """The last compressed key that ends at or before each query, int32; −1 for none."""
        return _last_whole(n, self.hp.length, self.hp.stride, device)

    # ---- the choice of blocks --------------------------------------------------------------------------

    def _important(
        self,
        q: Tensor,
        m: int,
        found: tuple[Tensor, Tensor, Tensor] | None,
        padded: Tensor | None,
    ) -> TokenBlocks:
        """The blocks with the largest weights of the compressed branch, and the forced ones."""
        hp, blocks = self.hp, -(-m // self.hp.block)
        b, kv_heads = q.shape[0], self.num_kv_heads
        width = min(blocks, max(hp.top_n, hp.num_initial + (hp.num_local if self._causal else 0)))
        rows = max(1, WEIGHTS_AT_ONCE // (b * q.shape[1] * max(1, m // hp.stride)))
        there = None if padded is None else occupied(padded, hp.block)[:, None, None]
        counts, indices = [], []
        for first in range(0, q.shape[2], rows):
            some = slice(first, min(first + rows, q.shape[2]))
            if found is None:
                score = torch.zeros(b, kv_heads, some.stop - first, blocks, device=q.device)
            else:
                score = self._scores(q, some, found[1], found[2], padded, blocks)
            mask = self._chosen(score, first, there)
            lists = TokenBlocks.from_block_mask(mask, hp.block, m, k_max=width)
            counts.append(lists.counts)
            indices.append(lists.indices)
        return TokenBlocks(torch.cat(counts, 2), torch.cat(indices, 2), hp.block, m)

    def _scores(
        self, q: Tensor, some: slice, lse: Tensor, keys: Tensor, padded: Tensor | None, blocks: int
    ) -> Tensor:
        """(B, Hkv, ·, Tk): weights of some queries on compressed keys, summed over a group and folded."""
        wide = torch.promote_types(q.dtype, torch.float32)
        rows = q[:, :, some].to(wide).unflatten(1, (keys.shape[1], -1))
        logits = rows @ keys.to(wide).unsqueeze(2).mT / math.sqrt(q.shape[-1])
        shift = lse[:, :, some].to(wide)
        shift = shift.masked_fill(shift == -math.inf, math.inf)  # a query without compressed keys: weights 0
        weights = (logits - shift.unflatten(1, (keys.shape[1], -1)).unsqueeze(-1)).exp()
        if self._causal:
            last = self._last_compressed(q.shape[2], q.device)[some]
            hidden = torch.arange(keys.shape[2], device=q.device) > last.unsqueeze(-1)
            weights = weights.masked_fill(hidden, 0.0)
        unread = self._unread(padded)
        if unread is not None:
            weights = weights.masked_fill(unread[:, None, None, None], 0.0)
        return self._folded(weights.sum(2), blocks)

    def _folded(self, weights: Tensor, blocks: int) -> Tensor:
        """Σ_i c_ij p_i over compressed keys (..., n_c) for each block j: c_ij strides are in both."""
        shared, per_block = self.hp.length // self.hp.stride, self.hp.block // self.hp.stride
        strides = sum(F.pad(weights, (s, shared - 1 - s)) for s in range(shared))
        assert isinstance(strides, Tensor)
        padded = F.pad(strides, (0, blocks * per_block - strides.shape[-1]))
        return padded.unflatten(-1, (blocks, per_block)).sum(-1)

    def _chosen(self, score: Tensor, first: int, there: Tensor | None) -> Tensor:
        """The mask of the blocks of the queries from ``first`` on, of the shape of ``score``."""
        block = torch.arange(score.shape[-1], device=score.device)
        seen = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device)
        if self._causal:
            own = torch.arange(first, first + score.shape[-2], device=score.device) // self.hp.block
            seen = block <= own.unsqueeze(-1)
        forced = first_blocks(seen, self.hp.num_initial)
        if self._causal:
            forced = forced | last_blocks(seen, self.hp.num_local)
        if there is not None:
            seen = seen & there
        score = score.nan_to_num(nan=0.0)  # of a query that diverged: the lists of all others still stand
        return topk(score, self.hp.top_n, seen.expand(score.shape), forced)

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """Compression, weights on compressed keys twice, and 4·D for every kept pair of each branch."""
        hp, keys = self.hp, self._compressed_keys(m)
        if not self._causal:
            return self._flops(m, n * keys, n * min(hp.top_n * hp.block, m))
        compressed = sum(min(keys, max(0, (t - hp.length + 1) // hp.stride + 1)) for t in range(n))
        most = max(hp.top_n, hp.num_initial + hp.num_local) - 1
        selected = sum(min(most, t // hp.block) * hp.block + t % hp.block + 1 for t in range(n))
        return self._flops(m, compressed, selected + sum(min(hp.window, t + 1) for t in range(n)))

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return self._flops(m, n * self._compressed_keys(m), n * m * (2 if self._causal else 1))

    def _flops(self, m: int, compressed_pairs: int, other_pairs: int) -> int:
        d, taps = self.head_dim, self.hp.length * self._compressed_keys(m)
        per_tap = 2 * d * d if self.hp.compress == "linear" else 0
        pairs = 6 * compressed_pairs + 4 * other_pairs
        return 2 * self.num_kv_heads * taps * per_tap + self.num_heads * d * pairs

    def _compressed_keys(self, m: int) -> int:
        return max(0, (m - self.hp.length) // self.hp.stride + 1)

    def layer_flops(self, n: int, m: int) -> int:
        """The gates, and with separate_kv three projections of keys and values, besides the usual ones."""
        kv = self.num_kv_heads * self.head_dim * (3 if self.hp.separate_kv else 1)
        width = 2 * n * (2 * self.embed_dim + 3 * self.num_heads) + 4 * m * kv
        return self.flops(n, m) + self.embed_dim * width

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Windows of tokens, compressed keys and values, lists, three outputs and their log-sum-exps."""
        keys, d = self._compressed_keys(m), self.head_dim
        blocks = -(-m // self.hp.block)
        per_kv_head = 2 * keys * (self.hp.length + 1) * d * itemsize + n * (4 * self.hp.top_n + 12 * blocks)
        return self.num_kv_heads * per_kv_head + self.num_heads * n * (2 * d * itemsize + 12)


@lru_cache(maxsize=32)  # one tensor per length: the masks that backends keep are found by it
@torch.inference_mode(False)
def _last_whole(n: int, length: int, stride: int, device: torch.device) -> Tensor:
    t = torch.arange(n, device=device)
    return ((t - length + 1) // stride).clamp(min=-1).int()
