"""Tile sizes and launch parameters of the recurrence's kernels, in one table."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Config:
    """Tiles of Dk and Dv (powers of two ≥ 16, the least a dot takes), warps and software-pipeline stages."""

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


def config(kernel: str, dk: int, dv: int, chunk: int, itemsize: int, capability: int) -> Config:
    """The configuration of ``states``, ``output`` or ``gradient``; ``itemsize`` of q, k and v in bytes."""
    if itemsize == 4:
        # A dot of fp32 tiles is three tf32 products, before Hopper with operands in registers: small tiles.
        # The gradient kernel still spills up to 0.6 KB a thread.
        table = {
            "states": Config(32, 64, 8, 2),
            "output": Config(32, 32, 8, 2),
            "gradient": Config(16, 32, 8, 1),
        }
    else:
        hopper = capability >= 90  # takes operands of a dot from shared memory, not from registers
        table = {
            # (64, 64) fp32 of state stays in registers over the whole segment; more tiles mean more programs,
            # and this kernel is the only one whose parallelism does not grow with N.
            "states": Config(64, 64, 4, 2),
            # Dv ≤ 128 in one tile: the scores of a chunk are computed once. Four warps are one group of
            # Hopper's for a (64, 64) product; before it they have too few registers.
            "output": Config(64, 128, 4 if dv <= 64 and hopper else 8, 2),
            # Two (L, L) blocks and two (L, block_k) accumulators are live: 8 warps with 32 columns of Dk
            # hold them in registers at L = 64. Short loops over tiles gain nothing from a pipeline.
            "gradient": Config(32, 64 if hopper else 32, 8 if chunk > 32 else 4, 1),
        }
    chosen = table[kernel]
    return Config(
        min(chosen.block_k, max(16, triton.next_power_of_2(dk))),
        min(chosen.block_v, max(16, triton.next_power_of_2(dv))),
        chosen.num_warps,
        chosen.num_stages,
    )


def segment_length(chunks: int, programs: int, processors: int) -> int:
    """Chunks that one program of the states kernel walks through, so that two programs fill a processor.

    ``programs`` is the number without segments. Segments cost one more pass over the states, so they are
    made only where heads and tiles are too few, and are not shorter than 8 chunks.
    """
    segments = max(1, min(2 * processors // programs, chunks // 8))
    return -(-chunks // segments)
