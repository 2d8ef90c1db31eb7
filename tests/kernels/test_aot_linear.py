"""The kernels of the linear operations compile for GPUs that are not here, without spills up to D = 128."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

KERNELS = {
    "linrec": {"states_kernel", "carry_kernel", "output_kernel", "row_terms_kernel", "gradient_kernel"},
    "kv_reduce": {"sums_kernel", "read_kernel", "row_terms_kernel", "feature_gradient_kernel"},
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spilling(op: str, capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attnbench.kernels.aot", "--op", op, "--capability", str(capability)]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == KERNELS[op]
    assert {(row["dtype"], row["head_dim"]) for row in rows} >= {
        (dtype, d) for dtype in ("float16", "bfloat16") for d in (64, 128, 256)
    }
    for row in rows:
        assert row["fits"], row
        if row["head_dim"] != 256:
            assert row["spill_bytes"] == 0, row
