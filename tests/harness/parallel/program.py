"""What each rank of test_split.py runs: every method against one device, in fp64, output and gradients."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from attnbench.harness.parallel.collectives import Ranks, gather
from attnbench.harness.parallel.layout import shard, unshard
from attnbench.harness.parallel.rank import ATTEND
from attnbench.harness.parallel.suite import METHODS
from attnbench.kernels import flash, kv_reduce, linrec

TOLERANCE = 1e-9


def whole(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """The same attention on one device, from other code."""
    if impl.startswith("softmax"):
        return flash(q, k, v, causal=causal, backend="reference")[0]
    if causal:
        return linrec(q, k, v, feature_map="elu1", normalize=True, backend="reference")[0]
    return kv_reduce(q, k, v, feature_map="elu1", backend="reference")


def check(impl: str, causal: bool, kv_heads: int, n: int, ranks: Ranks) -> float:
    """Largest difference of the output and the three gradients."""
    torch.manual_seed(n)
    shapes = ((2, 4, n, 8), (2, kv_heads, n, 8), (2, kv_heads, n, 8))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(2, 4, n, 8, dtype=torch.float64)
    output = whole(impl, *inputs, causal)
    expected = [output, *torch.autograd.grad(output, inputs, upstream)]

    layout = METHODS[impl].causal_layout if causal else "contiguous"
    mine = [shard(x.detach(), ranks.rank, ranks.size, layout).requires_grad_() for x in inputs]
    part = ATTEND[impl](*mine, ranks, causal=causal)
    gradients = torch.autograd.grad(part, mine, shard(upstream, ranks.rank, ranks.size, layout))
    got = [unshard(gather(x.detach(), ranks), layout) for x in (part, *gradients)]
    return max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))


def main() -> None:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    ranks = Ranks(rank, size)
    for impl in METHODS:
        for causal in (False, True):
            for kv_heads in (4, 2) if impl.startswith("softmax") else (4,):
                if impl == "softmax/ulysses" and kv_heads % ranks.size:
                    continue  # unsupported: it gives every rank whole heads
                for n in (4 * size, 16 * size):
                    worst = check(impl, causal, kv_heads, n, ranks)
                    sys.stdout.write(f"{impl} causal={causal} Hkv={kv_heads} N={n} worst={worst:.1e}\n")
                    assert worst < TOLERANCE
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
