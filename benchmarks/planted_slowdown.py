"""Does `attnbench compare` find a slow-down of a tenth in real code, and none where there is none?

Two copies of this source tree are compared; in one, noncausal linear attention first computes a tenth of
its tokens for nothing, in numpy, where no count of operators shows it. Then two equal copies are
compared. It takes minutes of a quiet machine:

    python benchmarks/planted_slowdown.py [--pairs 24] [--seqlen 4096]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attnbench

TREE = Path(attnbench.__file__).parent
KEPT_OUT = ("build", "runs", "tests", "docs", "dist", "_site", "*.egg-info", "__pycache__", ".*")
FILE = Path("kernels") / "kv_reduce" / "torch.py"
PLANTED = '''

def kv_reduce(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """The same, a tenth slower."""
    q_, k_, v_ = (x.detach().numpy()[..., : x.shape[-2] // 10, :] for x in (q, k, v))
    sums = (k_.clip(0) + 1).swapaxes(-1, -2) @ v_
    ((q_.clip(0) + 1) @ sums) / (k_.sum(-2, keepdims=True) * q_).sum(-1, keepdims=True)
    return _whole(q, k, v, **options)
'''


def copied(folder: Path, planted: bool) -> Path:
    """A copy of the running source tree, with or without the slow-down."""
    shutil.copytree(TREE, folder, ignore=shutil.ignore_patterns(*KEPT_OUT))
    if planted:
        file = folder / FILE
        text = file.read_text()
        assert text.count("def kv_reduce(") == 1
        file.write_text(text.replace("def kv_reduce(", "def _whole(") + PLANTED)
    return folder


def compared(base: Path, head: Path, pairs: int, seqlen: str) -> tuple[int, dict[str, Any]]:
    """Exit code and tables of `attnbench compare`."""
    options = ["--impl", "linear_transformer/torch", "--gpu", "cpu", "--pattern", "NS", "--workload", "tiny"]
    options += ["--seqlen", seqlen, "--direction", "fwd", "--threads", "1"]
    turns = ["--pairs", str(pairs), "--max-pairs", str(pairs), "--json"]
    command = [sys.executable, "-m", "attnbench.cli", "compare", str(base), str(head), *turns, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "{}")


def main() -> None:
    """Print both comparisons; exits with 1 unless the first finds the slow-down and the second none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--seqlen", default="4096")
    arguments = parser.parse_args()
    codes = []
    with tempfile.TemporaryDirectory() as scratch:
        base = copied(Path(scratch) / "base", planted=False)
        for name, planted in (("planted", True), ("identical", False)):
            head, start = copied(Path(scratch) / name, planted), time.monotonic()
            code, found = compared(base, head, arguments.pairs, arguments.seqlen)
            codes.append(code)
            print(f"{name}: exit code {code} after {time.monotonic() - start:.0f} s")
            print(json.dumps(found, indent=2))
    sys.exit(codes != [1, 0])


if __name__ == "__main__":
    main()
