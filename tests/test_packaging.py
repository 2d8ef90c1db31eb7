"""The wheel holds what git holds, and importing the package pulls in nothing it should not."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("harness", "impls", "kernels", "results", "site", "tasks")
OUTSIDE_THE_WHEEL = ("results/published/",)
"""Data that lives in a package's folder but is not installed."""


def _declared() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_the_list_of_packages_is_complete() -> None:
    found = {"attnbench"}
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join(("attnbench", *init.parent.relative_to(ROOT).parts)))
    assert sorted(found) == sorted(_declared())


@pytest.mark.slow
def test_the_wheel_holds_what_git_holds(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in listed:
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path / "dist",
        copy,
    ]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        packed = {name.removeprefix("attnbench/") for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        name
        for name in listed
        if (
            name in ("__init__.py", "cli.py", "errors.py", "py.typed") or name.startswith((*FOLDERS, "docs/"))
        )
        and "/" in name + "/"
        and not name.startswith(OUTSIDE_THE_WHEEL)
        and (ROOT / name).is_file()
    }
    assert packed == wanted


def test_importing_the_package_and_the_command_line_loads_no_torch() -> None:
    code = (
        "import sys, attnbench, attnbench.cli\n"
        "heavy = {'torch', 'triton', 'numpy', 'pandas', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "bare = {'harness', 'tasks', 'impls', 'kernels', 'results', 'cli'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not bare, bare\n"
        "assert 'site' not in sys.modules or 'attnbench' not in str(sys.modules['site'].__file__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_results_and_site_import_no_torch() -> None:
    code = (
        "import sys, attnbench.results.read, attnbench.results.report, attnbench.site.build\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_the_public_api_is_complete() -> None:
    import attnbench

    assert all(getattr(attnbench, name) is not None for name in attnbench.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        attnbench.nonsense  # noqa: B018
