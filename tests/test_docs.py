"""Documentation that is derived from the code is up to date, and its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.results.flags import FLAG_MEANING
from attnbench.results.schema import COLUMNS

ROOT = Path(__file__).resolve().parent.parent


def test_every_column_has_its_entry_in_metrics() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    missing = [column.name for column in COLUMNS if f"| `{column.name}` |" not in text]
    assert missing == []


def test_every_flag_that_the_code_raises_has_a_meaning() -> None:
    source = "".join(
        path.read_text() for folder in ("harness", "tasks") for path in (ROOT / folder).rglob("*.py")
    )
    raised = {*re.findall(r'Flag\(\s*"(\w+)"', source), *re.findall(r'"(\w+): observed [^"]*, limit', source)}
    assert len(raised) > 20
    assert raised - FLAG_MEANING.keys() == set()
    assert list(FLAG_MEANING) == sorted(FLAG_MEANING)


def test_derived_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/write_docs.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_relative_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("file", "name", "backend"),
    [("my_attention.py", "SigmoidAttention", "torch"), ("my_rows.py", "LabelledRows", "reference")],
)
def test_the_examples_of_add_your_own_hold_the_contract(
    tmp_path: Path, file: str, name: str, backend: str
) -> None:
    from attnbench.harness import contract
    from attnbench.impls import registry

    text = (ROOT / "docs/add-your-own.md").read_text()
    source = re.search(rf"```python\n(# {re.escape(file)}.*?)```", text, re.DOTALL)
    assert source is not None
    path = tmp_path / file
    path.write_text(source[1])
    kind = registry.mechanism(f"{path}:{name}")
    targets = [t for t in contract.targets(kind) if t.backend == backend]
    failed = [o for target in targets for o in contract.run_kit(target) if o.status == "failed"]
    assert targets
    assert failed == []


def test_the_example_of_analysis_runs() -> None:
    text = (ROOT / "docs/analysis.md").read_text()
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert source is not None
    values: dict[str, object] = {}
    exec(compile(source[1], "docs/analysis.md", "exec"), values)
    assert tuple(values["weights"].shape) == (1, 4, 64, 64)  # type: ignore[attr-defined]
