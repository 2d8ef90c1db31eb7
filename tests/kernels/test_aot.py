"""Every kernel compiles for GPUs that are not here, without spilling and within shared memory.

Hopper is checked always, the other architectures with ATTNBENCH_AOT=all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from attnbench.kernels import Unsupported, aot

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

EVERYTHING = os.environ.get("ATTNBENCH_AOT") == "all"
ALWAYS = 90

SPARSE_BACKWARD = {"backward_q", "backward_kv"}
WINDOWED = {"forward", "row_terms", *SPARSE_BACKWARD, "backward_bias"}
KERNELS = {
    "block_mass": {"mass"},
    "block_sparse": {"forward", *SPARSE_BACKWARD},
    "buckets": {"forward", "combine", "row_terms", "entry_terms", *SPARSE_BACKWARD, "sum_entries"},
    "few_query": {
        *("forward", "forward_resident", "merge", "row_terms", "backward_resident", "sum_splits"),
        *SPARSE_BACKWARD,
    },
    "flash": {"forward", "row_terms", *SPARSE_BACKWARD},
    "flash_int8": {"quantise", "attend"},
    "gather": {"forward", *SPARSE_BACKWARD, "sum_items"},
    "kv_reduce": {"sums_kernel", "read_kernel", "row_terms_kernel", "feature_gradient_kernel"},
    "linrec": {
        *("states_kernel", "carry_kernel", "output_kernel", "row_terms_kernel", "gradient_kernel"),
        *("inverse_kernel", "delta_states_kernel", "delta_local_kernel", "delta_state_gradients_kernel"),
        *("delta_gradient_kernel", "vector_scores_kernel", "vector_output_kernel", "vector_gradient_kernel"),
    },
    "neighborhood": WINDOWED,
    "query_softmax": {"owners", "mix", *SPARSE_BACKWARD},
    "selective_scan": {"chunk_states", "carry", "outputs", "gradients"},
    "tensor3": {"forward", "backward_q", "backward_set"},
    "token_blocks": {"forward", "merge", *SPARSE_BACKWARD, "sum_items"},
    "window": WINDOWED,
}


BF16 = {("bfloat16", d) for d in (64, 128, 256)}
USUAL = BF16 | {("float32", 128)}
SIZES: dict[str, set[tuple[str, int]]] = {
    **dict.fromkeys(("block_mass", "block_sparse", "buckets", "few_query", "gather", "token_blocks"), USUAL),
    **dict.fromkeys(("kv_reduce", "linrec"), USUAL | {("float16", 64)}),
    **dict.fromkeys(("flash", "neighborhood", "window"), BF16),
}
"""Dtypes and head dimensions that must be among the cases; of other operations, head dimensions alone."""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attnbench.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


def spill_limit(row: dict[str, object]) -> float:
    """Bytes per thread that a kernel may spill: none up to D = 128, with one exception."""
    if (row["kernel"], row["dtype"], row["capability"]) == ("gradient_kernel", "float32", 80):
        # two (64, 64) blocks and the operands of three tf32 products, which Ampere has in registers
        return 512
    return float("inf") if row["head_dim"] == 256 else 0


def test_every_operation_is_expected_to_compile() -> None:
    assert set(KERNELS) == set(aot.OPS)


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("op", aot.OPS)
def test_compiles_without_spilling(op: str, capability: int) -> None:
    if capability != ALWAYS and not EVERYTHING:
        pytest.skip("compiled with ATTNBENCH_AOT=all")
    done = _run("--op", op, "--capability", str(capability), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == KERNELS[op]
    assert {(row["dtype"], row["head_dim"]) for row in rows} >= SIZES.get(op, set())
    assert op == "selective_scan" or {row["head_dim"] for row in rows} >= {64, 128}
    assert op != "flash_int8" or {row["head_dim"] for row in rows} == {64, 128, 256}
    for row in rows:
        assert row["fits"], row
        assert 0 < row["registers"] <= 255, row
        assert row["spill_bytes"] <= spill_limit(row), row


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
