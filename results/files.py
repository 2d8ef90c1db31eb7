"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from attnbench.errors import AttnbenchError, UsageError


@contextlib.contextmanager
def atomically(path: str | Path) -> Iterator[Path]:
    """Path to write to in place of ``path``; becomes ``path`` when the block ends without an error.

    On an error nothing is left behind and a file that was there before is untouched. Raises AttnbenchError
    when the folder cannot be written or the disk is full.
    """
    final = Path(path)
    if final.name in ("", "..") or (os.path.lexists(final) and not final.is_file()):
        raise UsageError(f"{final}: observed no place for a file, expected the name of a file, new or old")
    draft = final.with_name(f".{final.stem}.{os.getpid()}{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(final)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(final.parent)
    except OSError as error:
        raise AttnbenchError(
            f"{final} cannot be written: {error.strerror or error}; nothing was changed. "
            "Free some space or choose another place"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a new or renamed entry of ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
