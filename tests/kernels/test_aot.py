"""Every kernel of flash compiles for GPUs that are not here, without spilling and within shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from attnbench.kernels import Unsupported, aot

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attnbench.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_flash_compiles_without_spilling(capability: int) -> None:
    done = _run("--op", "flash", "--capability", str(capability), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    kernels = {"forward", "row_terms", "backward_q", "backward_kv"}
    assert {row["kernel"] for row in rows} == kernels
    assert {(row["dtype"], row["head_dim"]) for row in rows} >= {("bfloat16", 64), ("bfloat16", 128)}
    for row in rows:
        assert row["fits"], row
        assert 0 < row["registers"] <= 255, row
        if row["head_dim"] <= 128:
            assert row["spill_bytes"] == 0, row


def test_only_the_operation_asked_for_is_imported() -> None:
    code = (
        "import sys; from attnbench.kernels import aot; aot.cases('flash', 90);"
        "print([name for name in sys.modules if name.startswith('attnbench') and name.endswith('.triton')])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['attnbench.kernels.flash.triton']", done.stderr


def test_misuse_is_a_usage_error() -> None:
    unknown = _run("--op", "flash", "--capability", "42")
    assert unknown.returncode == 2
    assert "one of 80, 86, 89, 90, 100, 120" in unknown.stderr
    with pytest.raises(Unsupported, match="TRITON_INTERPRET=1"):
        next(aot.compile_ops(["flash"], [90]))
    with pytest.raises(Unsupported, match=r"one of .*flash"):
        aot.cases("flush", 90)


def test_table_and_limits() -> None:
    row = aot.AotRow("flash", "causal", "forward", 86, "float16", None, 8, 2, 200, 101376, 0)
    assert row.fits
    assert not aot.AotRow("flash", "causal", "forward", 86, "float16", 64, 8, 2, 200, 101377, 0).fits
    heads, values = (line.split() for line in aot._table([row]).splitlines())
    assert heads[:3] == ["op", "case", "kernel"]
    assert values == ["flash", "causal", "forward", "86", "float16", "8", "2", "200", "101376", "0"]


def test_dtype_of_a_case_is_that_of_its_first_tensor() -> None:
    tensor = torch.empty(1, dtype=torch.half)
    assert aot._first_tensor((None, 3, (tensor, 1), torch.empty(1))) is tensor
    with pytest.raises(ValueError, match="without a tensor"):
        aot._first_tensor((1, 2))
