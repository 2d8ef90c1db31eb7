"""A version of attnbench to measure with: this one, a commit, a source tree or a wheel.

A version is a folder on PYTHONPATH that holds a package ``attnbench``; the dependencies are those of the
running environment, so that nothing but our own code differs between two versions.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import attnbench
from attnbench.errors import AttnbenchError, UsageError

HERE = "."
"""The name of the version that is running."""


@dataclass(frozen=True)
class Version:
    """A label for people, and the folder to put on PYTHONPATH."""

    label: str
    path: Path


@contextmanager
def opened(name: str, scratch: Path, slot: str) -> Iterator[Version]:
    """The version called ``name``, for the time of the block, under ``scratch``/``slot``.

    ``name`` is ``.`` for the version that runs, a folder with a source tree, a wheel, or anything that git
    knows as a commit of the repository around the current folder. Raises UsageError when it is none of these.
    """
    home = scratch / slot
    home.mkdir(parents=True)
    path = Path(name)
    if name == HERE:
        yield Version("this version", _linked(home, Path(attnbench.__file__).parent))
    elif path.suffix == ".whl":
        yield Version(path.name, _unpacked(home, path))
    elif path.is_dir():
        yield Version(str(path), _linked(home, _source_tree(path)))
    else:
        with _worktree(name, home) as tree:
            yield Version(name, _linked(home, tree))


def _source_tree(path: Path) -> Path:
    if not (path / "cli.py").is_file() or not (path / "harness").is_dir():
        raise UsageError(
            f"{path}: observed a folder without cli.py and harness/, expected a tree of attnbench"
        )
    return path


def _linked(home: Path, tree: Path) -> Path:
    (home / "attnbench").symlink_to(tree.resolve(), target_is_directory=True)
    return home


def _unpacked(home: Path, wheel: Path) -> Path:
    if not wheel.is_file():
        raise UsageError(f"{wheel}: no such file; build one with `python -m build --wheel`")
    shutil.unpack_archive(str(wheel), str(home), format="zip")
    if not (home / "attnbench").is_dir():
        raise UsageError(f"{wheel}: observed no package attnbench in it, expected a wheel of attnbench")
    return home


@contextmanager
def _worktree(commit: str, home: Path) -> Iterator[Path]:
    resolved = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}", "--")
    if resolved is None:
        raise UsageError(
            f"{commit!r}: expected a results folder or file, a source tree, a wheel, '.', or a commit of the "
            "git repository around this folder"
        )
    tree = home / "tree"
    if _git("worktree", "add", "--detach", str(tree), resolved.split()[0]) is None:
        raise AttnbenchError(f"git cannot check out {commit}; try `git worktree prune`")
    try:
        yield _source_tree(tree)
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str | None:
    """What git prints, None when it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment_of(version: Version, inherited: dict[str, str]) -> dict[str, str]:
    """The environment of a process that runs ``version``: it comes first on PYTHONPATH."""
    old = inherited.get("PYTHONPATH")
    return {**inherited, "PYTHONPATH": f"{version.path}:{old}" if old else str(version.path)}


def command(*arguments: str) -> list[str]:
    """The command line of attnbench in a process whose environment says which version it is."""
    return [sys.executable, "-m", "attnbench.cli", *arguments]
