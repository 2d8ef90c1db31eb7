"""Tuning on a real GPU: what is too large is dropped, the winner is right, and the next process finds it."""

import json
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from attnbench.kernels import tuning
from attnbench.kernels.backends import interpreting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(interpreting(), reason="kernels are interpreted")]


@triton.jit
def _square(x, o, N, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_M) + tl.program_id(1) * BLOCK_M
    total = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + rows[:, None] * N + k[None, :])
        b = tl.load(x + k[:, None] * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(o + rows[:, None] * N + columns[None, :], total.to(tl.float16))


@dataclass(frozen=True)
class Config:
    block_m: int
    block_k: int
    num_stages: int


CANDIDATES = (Config(16, 16, 1), Config(64, 32, 3), Config(128, 256, 6))  # the last asks for 768 KiB


def test_the_winner_is_found_stored_and_right(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.forget()
    n = 1024
    x = torch.randn(n, n, device="cuda", dtype=torch.float16) / n**0.5
    o = torch.empty_like(x)

    def launch(config):
        grid = (n // config.block_m, n // config.block_m)
        options = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "num_stages": config.num_stages}
        return lambda: _square[grid](x, o, n, **options)

    def choose():
        with tuning.picked() as choices:
            config = tuning.pick("test", "square", (n,), CANDIDATES, launch, x.device)
        return config, choices[0].source

    assert choose() == (CANDIDATES[0], "default")
    with tuning.set_mode("tune"):
        config, source = choose()
    assert (config, source) == (CANDIDATES[1], "tuned")
    (path,) = (tmp_path / "attnbench" / "tuning").glob("*.json")
    (entry,) = json.loads(path.read_text())["entries"].values()
    assert list(entry["dropped"]) == ["2"]
    assert entry["dropped"]["2"].startswith("OutOfResources")
    launch(config)()
    torch.testing.assert_close(o, x @ x, rtol=2e-2, atol=2e-3)
    tuning.forget()
    assert choose() == (CANDIDATES[1], "cache")
    tuning.forget()
