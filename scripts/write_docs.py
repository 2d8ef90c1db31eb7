"""Write the pages of docs/ that are derived from the code, so that nothing is said twice.

Run as `python scripts/write_docs.py`; `--check` only compares (tests/test_docs.py does).
"""

from __future__ import annotations

import sys
from pathlib import Path

from attnbench.results.schema import COLUMNS, GROUPS, STATUS_MEANING, Column

ROOT = Path(__file__).resolve().parent.parent
INTRO = """\
<!-- Written by scripts/write_docs.py from results/schema.py: edit there. -->
# Metrics: every column of a result

One row is one planned case in one block (a fresh process). Columns marked **ok only** are filled only where
the status is `ok`: a case that failed never carries a time. Nothing is imputed: an unknown value is null.

## Status

| status | meaning |
|---|---|
"""


def metrics() -> str:
    """The text of docs/metrics.md: the statuses, then every column by group."""
    text = INTRO + "".join(f"| `{status}` | {meaning} |\n" for status, meaning in STATUS_MEANING.items())
    for group, title in GROUPS.items():
        text += f"\n## {title}\n\n| column | type | unit | meaning |\n|---|---|---|---|\n"
        text += "".join(_line(column) for column in COLUMNS if column.group == group)
    return text


def _line(column: Column) -> str:
    ok_only = " **ok only**" if column.performance else ""
    return f"| `{column.name}` | {column.type} | {column.unit or '–'} | {column.doc}{ok_only} |\n"


PAGES = {"docs/metrics.md": metrics}


def main() -> int:
    """Write or compare every page; 1 when a page is out of date."""
    stale = [path for path, page in PAGES.items() if _differs(ROOT / path, page())]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is out of date: run python scripts/write_docs.py")
        return bool(stale)
    for path in stale:
        (ROOT / path).write_text(PAGES[path]())
        print(f"wrote {path}")
    return 0


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_text() != text


if __name__ == "__main__":
    sys.exit(main())
