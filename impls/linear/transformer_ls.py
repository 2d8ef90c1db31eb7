"""Long-short transformer: a window of exact keys and a few compressed ones in one softmax."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import flash, merge, padding_bias

Partial = tuple[Tensor, Tensor | None]
"""Output and log-sum-exp of the attention to some of the keys."""


class TransformerLS(Attention):
    """Joint softmax over a local window and keys that a dynamic projection compresses."""

    spec = Spec(
        id="transformer_ls",
        name="Transformer-LS (long-short transformer)",
        family="linear",
        kind="mixer",
        paper=Paper(
            "Long-Short Transformer: Efficient Transformers for Language and Vision",
            2021,
            arxiv="2107.02192",
            venue="NeurIPS 2021",
        ),
        patterns=(Pattern.NS, Pattern.CS),
        summary="Each query attends to a window of tokens and to compressed tokens, in one softmax.",
        formula="o_i = softmax([q_i·K_window ; q_i·K_c] / √D) [V_window ; V_c], K_c = LN(softmax(x W_p)ᵀ K)",
        cost="O(N·(R + w)·C); CS O(N·(w + N·r/c)·C)",
        upstream="NVIDIA/transformer-ls; Shark-NLP/CAB modules/transformer_ls.py",
        query_separable=False,
        permutation_invariant=False,
        linear_in_v=False,
        row_sum="free",
        ops=("flash",),
        hyper=(
            Hyper("rank", 32, "compressed keys R of the whole sequence (NS)", cab=16),
            Hyper("segment", 8, "tokens w of a segment; its window adds w/2 on each side (NS)", cab=16),
            Hyper("window", 512, "newest tokens that a query sees, itself among them (CS)", cab=256),
            Hyper("chunk", 16, "tokens of a chunk that is compressed as a whole (CS)", cab=32),
            Hyper("chunk_rank", 1, "compressed keys of a chunk (CS)", cab=1),
            Hyper(
                "variant",
                "paper",
                "cab prepends mem_len zero tokens under CS, whose keys every query sees",
                choices=("paper", "cab"),
            ),
            Hyper("mem_len", 1024, "zero tokens of variant cab", cab=1024),
        ),
        test_hyper={"rank": 4, "segment": 4, "window": 6, "chunk": 4, "mem_len": 8},
        deviations=(
            "No relative position terms under CS: they need N×N scores beside the keys, and every mechanism "
            "here is compared without a position code of its own.",
            "No depthwise convolution on V, which upstream offers as an option.",
            "No bias in W_p: it would cancel in the softmax over the tokens.",
            "A chunk of padding alone is removed, and a query that sees nothing outputs 0 before W_o.",
        ),
    )

    def setup(self) -> None:
        """Create projections, the compressor and the LayerNorms of the two branches."""
        for name in ("window", "chunk") if self.pattern is Pattern.CS else ("segment",):
            if getattr(self.hp, name) < 1:
                raise UsageError(
                    f"transformer_ls: observed {name}={getattr(self.hp, name)}, expected at least 1"
                )
        c = self.embed_dim
        self.q_proj = nn.Linear(c, c, bias=self.bias)
        self.k_proj = nn.Linear(c, c, bias=self.bias)
        self.v_proj = nn.Linear(c, c, bias=self.bias)
        self.out_proj = nn.Linear(c, c, bias=self.bias)
        self.compress = nn.Linear(c, self.num_heads * self._rank, bias=False)
        self.norm_window = nn.LayerNorm(c)
        self.norm_compressed = nn.LayerNorm(c)

    @property
    def _rank(self) -> int:
        """Compressed keys of a chunk, which under NS is the whole sequence."""
        return int(self.hp.chunk_rank if self.pattern is Pattern.CS else self.hp.rank)

    @property
    def _memory(self) -> int:
        """Zero tokens before the sequence."""
        return int(self.hp.mem_len) if self.pattern is Pattern.CS and self.hp.variant == "cab" else 0

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Mix x (B, N, C) → (B, N, C); ``context`` must be None. UsageError otherwise."""
        if context is not None:
            raise UsageError(f"{self.spec.id}: observed a context, expected none (patterns NS and CS)")
        q = self.split(self.q_proj(x), self.num_heads)
        mix = self._causal if self.pattern is Pattern.CS else self._noncausal
        return self.out_proj(self.join(mix(x, q, key_padding_mask)))

    def _noncausal(self, x: Tensor, q: Tensor, padding: Tensor | None) -> Tensor:
        """Windows around the segments of x, and R keys compressed from all of it: (B, H, N, D)."""
        n, w = x.shape[1], self.hp.segment
        k, v = self.norm_window(self.k_proj(x)), self.norm_window(self.v_proj(x))
        reach = max(w // 2, 1)
        near = {"window": (reach, w - 1 + reach), "q_pos": _segment_starts(n, w, x.device)}
        return self._joint(
            self._attend_near(q, k, v, padding, near),
            self._attend_far(q, x, (k, v), padding, (1, n), {}),
        )

    def _causal(self, x: Tensor, q: Tensor, padding: Tensor | None) -> Tensor:
        """The newest tokens, and the compressed keys of all chunks before the query's: (B, H, N, D).

        The last chunk is seen by no query, so all chunks that are compressed are whole.
        """
        n, memory = x.shape[1], self._memory
        if memory:
            x = F.pad(x, (0, 0, memory, 0))
            padding = None if padding is None else F.pad(padding, (memory, 0))
        k, v = self.k_proj(x), self.v_proj(x)
        chunks = (memory + n - 1) // self.hp.chunk, self.hp.chunk
        near = {"causal": True, "window": (self.hp.window - 1, 0)}
        last = _last_keys(n, memory, self.hp.chunk, self._rank, x.device)
        return self._joint(
            self._attend_near(q, self.norm_window(k), self.norm_window(v), padding, near),
            self._attend_far(q, x, (k, v), padding, chunks, {"causal": True, "q_pos": last}),
        )

    def _attend_near(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, options: dict[str, Any]
    ) -> Partial:
        """Attention of q to the tokens themselves, k and v (B, N, C)."""
        k, v = self.split(k, self.num_heads), self.split(v, self.num_heads)
        return flash(q, k, v, key_bias=padding_bias(padding), backend=self.backend, **options)

    def _attend_far(
        self,
        q: Tensor,
        x: Tensor,
        keys_and_values: tuple[Tensor, Tensor],
        padding: Tensor | None,
        chunks: tuple[int, int],
        options: dict[str, Any],
    ) -> Partial | None:
        """Attention of q to r compressed keys of each chunk, ``chunks`` being their number and length.

        None when there is no such key.
        """
        length = chunks[0] * chunks[1]
        if length * self._rank == 0:
            return None
        bias, padded = None, None
        if padding is not None:
            padded = padding[:, :length].unflatten(1, chunks)
            bias = padding_bias(padded.all(-1).repeat_interleave(self._rank, 1))
        weights = self._compression(x[:, :length].unflatten(1, chunks), padded)
        k, v = (self._compressed(weights, y[:, :length]) for y in keys_and_values)
        return flash(q, k, v, key_bias=bias, backend=self.backend, **options)

    def _compression(self, x: Tensor, padded: Tensor | None) -> Tensor:
        """Softmax over the tokens of each chunk of x (B, T, L, C), softmax in fp32: (B, H, T, r, L)."""
        logits = self.compress(x)
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        if padded is not None:  # finite: a chunk of padding alone is removed later
            logits = logits.masked_fill(padded.unsqueeze(-1), torch.finfo(logits.dtype).min)
        weights = logits.unflatten(-1, (self.num_heads, -1)).softmax(2)
        return weights.permute(0, 3, 1, 4, 2).to(x.dtype)

    def _compressed(self, weights: Tensor, y: Tensor) -> Tensor:
        """Weighted sums of the heads of y (B, T·L, C), normalised over all heads: (B, H, T·r, D)."""
        heads = self.split(y, self.num_heads).unflatten(2, (weights.shape[2], -1))
        pooled = (weights @ heads).flatten(2, 3)
        return self.split(self.norm_compressed(self.join(pooled)), self.num_heads)

    @staticmethod
    def _joint(near: Partial, far: Partial | None) -> Tensor:
        """One softmax over near and far keys."""
        if far is None:
            return near[0]
        (near_o, near_lse), (far_o, far_lse) = near, far
        assert near_lse is not None  # need_lse is True
        assert far_lse is not None
        return merge(near_o, near_lse, far_o, far_lse)[0]

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """Projections, compression, and 4·C for every visible (query, key) pair."""
        return self._flops(n, *self._pairs(n))

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        length = n + self._memory
        return self._flops(n, n * length, n * self._slots(length))

    def _flops(self, n: int, window_pairs: int, compressed_pairs: int) -> int:
        c, length, rank = self.embed_dim, n + self._memory, self._rank
        causal = self.pattern is Pattern.CS
        pooled = (length - 1) // self.hp.chunk * self.hp.chunk if causal else length
        projections = 4 * n * c * c + 4 * length * c * c + 2 * pooled * c * self.num_heads * rank
        return projections + 4 * pooled * c * rank + 4 * c * (window_pairs + compressed_pairs)

    def _pairs(self, n: int) -> tuple[int, int]:
        """Visible pairs per head: in the windows, and with compressed keys."""
        length = n + self._memory
        i = torch.arange(length - n, length)
        if self.pattern is Pattern.CS:
            near = torch.minimum(i + 1, torch.tensor(self.hp.window)).sum()
            return int(near), int((i // self.hp.chunk * self.hp.chunk_rank).sum())
        w = self.hp.segment
        reach, start = max(w // 2, 1), i // w * w
        near = (start + w - 1 + reach).clamp(max=n - 1) - (start - reach).clamp(min=0) + 1
        return int(near.sum()), n * self.hp.rank

    def _slots(self, length: int) -> int:
        """Compressed keys of ``length`` tokens."""
        chunks = (length - 1) // self.hp.chunk if self.pattern is Pattern.CS else 1
        return int(chunks * self._rank)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Compressed keys and values, and two log-sum-exps in fp32."""
        return 2 * itemsize * self.embed_dim * self._slots(n + self._memory) + 8 * self.num_heads * n


@lru_cache(maxsize=32)  # one tensor per length: the masks that backends keep are found by it
@torch.inference_mode(False)
def _segment_starts(n: int, w: int, device: torch.device) -> Tensor:
    """First token of each query's segment, int32."""
    return (torch.arange(n, device=device) // w * w).int()


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _last_keys(n: int, memory: int, chunk: int, rank: int, device: torch.device) -> Tensor:
    """Index of the last compressed key before each query's chunk, int32; −1 for none."""
    return (torch.arange(memory, memory + n, device=device) // chunk * rank - 1).int()
