"""Arrays decoded from a data set, kept between runs: a cache never outlives the fingerprint of its source."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.sources import Source

Arrays = Mapping[str, NDArray[np.generic]]
"""Inputs ``x`` and targets ``y``."""


def folder() -> Path:
    """Where caches are written: ``~/.cache/attnbench/decoded``."""
    return Path.home() / ".cache" / "attnbench" / "decoded"


def cached(source: Source, key: str, decode: Callable[[], Arrays]) -> Arrays:
    """The arrays ``x`` and ``y`` that ``decode`` makes of ``source``, read back when they were made before.

    The file is ``<data set>-<key>-<fingerprint>.npz``; a file that cannot be read is written anew.
    """
    fingerprint = source.fingerprint()
    path = folder() / f"{source.data_set.name}-{key}-{fingerprint[:16]}.npz"
    kept = _load(path, fingerprint)
    if kept is not None:
        return kept
    made = decode()
    meta = json.dumps({"data_set": source.data_set.name, "key": key, "fingerprint": fingerprint})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as stream:
        np.savez(stream, x=made["x"], y=made["y"], meta=np.array(meta))
    part.replace(path)
    return made


def _load(path: Path, fingerprint: str) -> Arrays | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if json.loads(str(stored["meta"]))["fingerprint"] != fingerprint:
                return None
            return {"x": stored["x"], "y": stored["y"]}
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError):
        return None
