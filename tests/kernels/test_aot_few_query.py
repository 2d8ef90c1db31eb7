"""The kernels of few_query compile for GPUs that are not here, without spills up to D = 128."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

KERNELS = {
    "forward",
    "forward_resident",
    "merge",
    "row_terms",
    "backward_q",
    "backward_kv",
    "backward_resident",
    "sum_splits",
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spilling(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attnbench.kernels.aot", "--op", "few_query", "--capability"]
    command += [str(capability), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == KERNELS
    assert {(row["dtype"], row["head_dim"]) for row in rows} >= {
        *(("bfloat16", d) for d in (64, 128, 256)),
        ("float32", 128),
    }
    for row in rows:
        assert row["fits"], row
        if row["head_dim"] != 256:
            assert row["spill_bytes"] == 0, row
