"""Is the latency that the harness reports the latency that PyTorch's own timer reports?

Two tables: the harness over `torch.utils.benchmark` in one process, measured in turns, at several lengths;
and the harness against itself (A/A) over fresh processes, with the interval of the ratio. Wants a quiet
machine:

    python benchmarks/timing_honesty.py [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils import benchmark

from attnbench.harness import timing
from attnbench.harness.config import RunConfig
from attnbench.harness.run import run
from attnbench.harness.subject import build
from attnbench.impls.case import Case
from attnbench.results.stats import ratio_interval
from attnbench.tasks import workloads

TURNS = 5
BLOCKS = 8


def against_torch(n: int, threads: int) -> tuple[float, float]:
    """Median of medians, in µs, of the harness and of `torch.utils.benchmark`, measured in turns."""
    workload = workloads.entry("tiny").workload
    subject = build(Case("softmax", "sdpa_flash", "CS", workload, n, n, "float32", "fwd", "cpu"))
    device = timing.open_device("cpu")
    timer = benchmark.Timer("step()", globals={"step": subject.step}, num_threads=threads)
    ours, theirs = [], []
    for _ in range(TURNS):
        ours.append(timing.measure(subject.step, device).columns()["time_us"])
        theirs.append(timer.blocked_autorange(min_run_time=0.5).median * 1e6)
    return statistics.median(ours), statistics.median(theirs)


def against_itself(threads: int) -> tuple[float, float, float]:
    """Ratio of every second block to the others, with its 95 % interval; every block is a fresh process."""
    config = RunConfig(
        impl=("softmax/sdpa_flash",),
        gpu="cpu",
        workload=("tiny",),
        pattern=("CS",),
        seqlen=(1024,),
        direction=("fwd",),
        preset="small",
        blocks=BLOCKS,
        threads=threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = sorted(run(config, Path(folder) / "aa").rows, key=lambda row: row["block"])
    times = [row["time_us"] for row in rows]
    found = ratio_interval(times[0::2], times[1::2])
    assert found is not None
    return found.value, found.lo, found.hi


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    timing.pin(threads)
    torch.set_num_threads(threads)
    print("N      harness µs   torch.utils.benchmark µs   ratio")
    for n in (1024, 2048, 4096):
        ours, theirs = against_torch(n, threads)
        print(f"{n:<6} {ours:10.1f}   {theirs:24.1f}   {ours / theirs:.3f}")
    value, lo, hi = against_itself(threads)
    print(f"A/A over {BLOCKS} processes: ratio {value:.4f}, 95 % interval [{lo:.4f}, {hi:.4f}]")


if __name__ == "__main__":
    main()
