"""Times of the operations that most mechanisms stand on, for pytest-benchmark to store and compare:

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

import pytest
import torch

GPU = "auto" if torch.cuda.is_available() else "cpu"
DTYPE = "bf16" if torch.cuda.is_available() else "fp32"
IMPLS = ("softmax", "softmax/sdpa_flash", "linear_transformer", "retention", "local_window", "nystromformer")


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("pattern", ["NS", "CS"])
@pytest.mark.parametrize("impl", IMPLS)
def test_speed(attnbench_case, impl: str, pattern: str, direction: str) -> None:
    import attnbench

    if pattern not in attnbench.spec(impl.partition("/")[0]).patterns:
        pytest.skip(f"{impl} has no pattern {pattern}")
    attnbench_case(impl, pattern=pattern, n=512, dtype=DTYPE, direction=direction, gpu=GPU)
