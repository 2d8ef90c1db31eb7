"""One call on a GPU: check our kernels, tune them, race them against others, and report on the goals.

`make gpu`, or `python scripts/gpu.py --out FOLDER`, where attnbench is installed. Takes less than its budget
of seconds, and leaves rows and a report whatever happens. `--dry-run` takes every step on a CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    """Run everything, or compile one part of the races (what the run starts processes for)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of rows and report")
    parser.add_argument("--seconds", type=float, default=540.0, help="budget of the whole call")
    parser.add_argument("--prepare", type=float, default=200.0, help="part of it for checks and compilation")
    parser.add_argument("--compilers", type=int, default=10, help="processes that compile")
    parser.add_argument("--no-checks", action="store_true", help="leave the tests out")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: do all steps work?")
    parser.add_argument("--compile", metavar="I/N", help="compile this part and leave")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # before torch and Triton are imported
    from attnbench.errors import AttnbenchError
    from attnbench.harness.config import parse_shard
    from attnbench.harness.goals import stages

    if options.compile:
        stages.compile_part(parse_shard(options.compile), options.seconds, options.dry_run, _log)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the report is written on the way out
    plan = stages.Plan(
        out=options.out,
        budget_s=options.seconds,
        prepare_s=options.prepare,
        compilers=options.compilers,
        dry=options.dry_run,
        checks=not options.no_checks,
    )
    try:
        return stages.run(plan, _log)
    except AttnbenchError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return error.exit_code


def _log(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
