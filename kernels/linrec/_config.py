"""Tile sizes and launch parameters of the recurrence's kernels, in one table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import triton


@dataclass(frozen=True)
class Config:
    """Tiles of Dk and Dv (powers of two ≥ 16, the least a dot takes), warps and software-pipeline stages."""

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


_WHOLE_COLUMNS = ("delta_states", "delta_state_gradients")
"""Kernels that hold all of Dk: their tiles vary over Dv alone, and one more stage would not fit."""


def config(kernel: str, dk: int, dv: int, chunk: int, itemsize: int, capability: int) -> Config:
    """The configuration of a kernel by its name in the table; ``itemsize`` of q, k and v in bytes."""
    if itemsize == 4:
        # A dot of fp32 tiles is three tf32 products, before Hopper with operands in registers: small tiles.
        # The gradient kernel still spills 0.3 KB a thread for sm_80: two (L, L) blocks fill the registers.
        table = {
            "states": Config(32, 64, 8, 2),
            "output": Config(32, 32, 8, 2),
            "gradient": Config(16, 16, 8, 1),
            "inverse": Config(32, 16, 8, 1),
            "delta_local": Config(32, 32, 8, 2),
            "delta_states": Config(256, 32 if dk <= 64 else 16, 8, 1),
            "delta_state_gradients": Config(256, 32 if dk <= 64 else 16, 8, 1),
            "delta_gradient": Config(16, 16, 8, 1),
            "vector_states": Config(32, 32, 8, 1),
            "vector_scores": Config(16, 16, 8, 1),
            "vector_output": Config(16, 32, 8, 1),
            "vector_gradient": Config(16, 16, 8, 1),
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
            "inverse": Config(64, 16, 4, 2),
            "delta_local": Config(64, 128, 4 if dv <= 64 and hopper else 8, 2),
            # Chunks follow one another here, whole columns of the state in registers: narrow tiles of Dv
            # give the programs that the length cannot.
            "delta_states": Config(256, 32, 4 if dk <= 128 else 8, 2 if dk <= 64 else 1),
            "delta_state_gradients": Config(256, 32 if dk <= 128 else 16, 4 if dk <= 64 else 8, 1),
            "delta_gradient": Config(32 if hopper else 16, 32, 8 if chunk > 32 else 4, 1),
            # Explicit decays of (L, block) in fp32 beside the (L, L) block that they weight.
            "vector_states": Config(64, 64, 8, 2),
            "vector_scores": Config(32, 16, 8 if chunk > 32 else 4, 1),
            "vector_output": Config(64, 64, 8 if chunk > 32 else 4, 1),
            "vector_gradient": Config(32, 32, 8 if chunk > 32 else 4, 1),
        }
    chosen = table[kernel]
    return Config(
        min(chosen.block_k, max(16, triton.next_power_of_2(dk))),
        min(chosen.block_v, max(16, triton.next_power_of_2(dv))),
        chosen.num_warps,
        chosen.num_stages,
    )


@lru_cache(maxsize=1024)
def candidates(
    kernel: str, dk: int, dv: int, chunk: int, itemsize: int, capability: int
) -> tuple[Config, ...]:
    """The configurations to tune among, the default first: it with other warps, stages, or half a tile."""
    default = config(kernel, dk, dv, chunk, itemsize, capability)
    others = [replace(default, num_warps=12 - default.num_warps)]  # the other one of four and eight
    if kernel in _WHOLE_COLUMNS:
        others.append(replace(default, block_v=max(16, default.block_v // 2)))
        others.append(replace(default, block_v=16))
    else:
        others.append(replace(default, num_stages=default.num_stages + 1))
        others.append(replace(default, block_k=max(16, default.block_k // 2)))
        others.append(replace(default, block_v=max(16, default.block_v // 2)))
        others += [replace(each, num_warps=12 - each.num_warps) for each in others[-2:]]
    others.append(replace(default, num_stages=max(1, default.num_stages - 1)))
    return tuple(dict.fromkeys((default, *others)))


def segment_length(chunks: int, programs: int, processors: int) -> int:
    """Chunks that one program of the states kernel walks through, so that two programs fill a processor.

    ``programs`` is the number without segments. Segments cost one more pass over the states, so they are
    made only where heads and tiles are too few, and are not shorter than 8 chunks.
    """
    segments = max(1, min(2 * processors // programs, chunks // 8))
    return -(-chunks // segments)
