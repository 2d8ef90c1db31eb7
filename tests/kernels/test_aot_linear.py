"""The kernels of the linear operations compile for GPUs that are not here, without spills up to D = 128."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

KERNELS = {
    "linrec": {
        *("states_kernel", "carry_kernel", "output_kernel", "row_terms_kernel", "gradient_kernel"),
        *("inverse_kernel", "delta_states_kernel", "delta_local_kernel", "delta_state_gradients_kernel"),
        *("delta_gradient_kernel", "vector_scores_kernel", "vector_output_kernel", "vector_gradient_kernel"),
    },
    "kv_reduce": {"sums_kernel", "read_kernel", "row_terms_kernel", "feature_gradient_kernel"},
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spilling(op: str, capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attnbench.kernels.aot", "--op", op, "--capability", str(capability)]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == KERNELS[op]
    assert {(row["dtype"], row["head_dim"]) for row in rows} >= {
        *(("bfloat16", d) for d in (64, 128, 256)),
        ("float16", 64),
        ("float32", 128),
    }
    for row in rows:
        assert row["fits"], row
        if row["dtype"] == "float32" and row["kernel"] == "gradient_kernel" and capability == 80:
            # two (64, 64) blocks and the operands of three tf32 products, which Ampere has in registers
            assert row["spill_bytes"] <= 512, row
        elif row["head_dim"] != 256:
            assert row["spill_bytes"] == 0, row
