"""LJ Speech, and the times of its phones by the Montreal forced aligner."""

from __future__ import annotations

import re
import wave
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.loaders import _read
from attnbench.tasks.data.sources import Parts, Source, damaged

SAMPLE_RATE = 22_050

_HELD_OUT = {"LJ001": "test", "LJ002": "test", "LJ003": "dev"}
"""fairseq's split: by the book that a clip was read from."""


@dataclass(frozen=True)
class Clip:
    """One recorded sentence; ``normalised`` has numbers and abbreviations spelled out."""

    id: str
    text: str
    normalised: str

    @property
    def part(self) -> str:
        """``test`` for ids that start with LJ001 or LJ002, ``dev`` for LJ003, else ``train``."""
        return _HELD_OUT.get(self.id.split("-")[0], "train")


class LJSpeech(Source):
    """LJ Speech 1.1 (Ito and Johnson, 2017) with the parts of fairseq: train, dev and test."""

    marks = ("metadata.csv",)
    nested = ("LJSpeech-1.1",)
    published: ClassVar[Parts] = {"train": 12_228, "dev": 349, "test": 523}

    @cached_property
    def _clips(self) -> tuple[Clip, ...]:
        path = self.root / "metadata.csv"
        found = []
        for number, line in enumerate(_read.lines(path), 1):
            fields = line.split("|")
            if len(fields) != 3:
                raise damaged(path, f"{len(fields)} fields in line {number}", "id|text|normalised text")
            found.append(Clip(*fields))
        return tuple(found)

    def clips(self, part: str) -> tuple[Clip, ...]:
        """The clips of ``part``, in the order of the metadata."""
        self.part(part)
        return tuple(clip for clip in self._clips if clip.part == part)

    def waveform(self, clip: Clip) -> NDArray[np.float32]:
        """The samples of ``clip`` in [-1, 1), at ``SAMPLE_RATE``."""
        path = self.root / "wavs" / f"{clip.id}.wav"
        if not path.is_file():
            raise self.missing(f"wavs/{path.name}")
        try:
            with wave.open(str(path), "rb") as file:
                kind = (file.getframerate(), file.getnchannels(), file.getsampwidth())
                samples = file.readframes(file.getnframes())
        except (wave.Error, EOFError) as error:
            raise damaged(path, error, "a WAV file") from None
        if kind != (SAMPLE_RATE, 1, 2):
            raise damaged(
                path,
                f"{kind[0]} Hz, {kind[1]} channels, {8 * kind[2]} bit",
                f"{SAMPLE_RATE} Hz, mono, 16 bit",
            )
        return np.frombuffer(samples, "<i2").astype(np.float32) / 32_768.0

    def count(self, part: str) -> int:
        """Clips of ``part`` that the metadata list."""
        return len(self.clips(part))

    def sample(self, part: str) -> tuple[Clip, NDArray[np.float32]]:
        """The first clip with its samples."""
        first = self.clips(part)[0]
        return first, self.waveform(first)

    def files(self) -> Iterable[Path]:
        """The metadata and all recordings."""
        return [self.root / "metadata.csv", *(self.root / "wavs").glob("*.wav")]


@dataclass(frozen=True)
class Interval:
    """One phone of an alignment; ``label`` is empty or ``sil``/``sp``/``spn`` where nothing is said."""

    start_s: float
    end_s: float
    label: str


class Alignments(Source):
    """TextGrids of LJ Speech by clip id, from the archive or from a folder."""

    marks = ("ljspeech_mfa.zip", "**/*.TextGrid")
    published: ClassVar[Parts] = {"clips": None}

    @cached_property
    def _grids(self) -> dict[str, Path | str]:
        """Where the alignment of a clip is: a file, or the name of a member of the archive."""
        archive = self.root / "ljspeech_mfa.zip"
        if not archive.is_file():
            return {path.stem: path for path in sorted(self.root.glob("**/*.TextGrid"))}
        try:
            with zipfile.ZipFile(archive) as file:
                names = [name for name in file.namelist() if name.endswith(".TextGrid")]
        except zipfile.BadZipFile as error:
            raise damaged(archive, error, "a ZIP archive") from None
        return {Path(name).stem: name for name in names}

    def ids(self) -> tuple[str, ...]:
        """Ids of the aligned clips, sorted."""
        return tuple(sorted(self._grids))

    def phones(self, clip: str) -> tuple[Interval, ...]:
        """The phones of the clip with id ``clip``, without gaps from its start to its end."""
        place = self._grids.get(clip)
        if place is None:
            raise self.missing(f"{clip}.TextGrid")
        if isinstance(place, Path):
            return parse_textgrid(_read.text(place), place)
        archive = self.root / "ljspeech_mfa.zip"
        try:
            with zipfile.ZipFile(archive) as file:
                content = file.read(place).decode("utf-8")
        except (zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise damaged(archive / place, error, "a TextGrid in UTF-8") from None
        return parse_textgrid(content, archive / place)

    def count(self, part: str) -> int:
        """Aligned clips."""
        return len(self._grids)

    def sample(self, part: str) -> tuple[Interval, ...]:
        """The phones of the first clip."""
        return self.phones(self.ids()[0])

    def files(self) -> Iterable[Path]:
        """The archive, or all TextGrids."""
        archive = self.root / "ljspeech_mfa.zip"
        return [archive] if archive.is_file() else self.root.glob("**/*.TextGrid")


_VALUE = re.compile(r'"((?:[^"]|"")*)"|(?<![^\s])(-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?![^\s])')
"""What counts in a TextGrid: quoted texts and free-standing numbers, in its long and its short form alike."""


def parse_textgrid(content: str, path: Path, tier: str = "phones") -> tuple[Interval, ...]:
    """The intervals of ``tier`` in a TextGrid. Raises DataDamaged, naming ``path``."""
    values: list[str | float] = [
        found[1].replace('""', '"') if found[1] is not None else float(found[2])
        for found in _VALUE.finditer(content)
    ]

    def fail(observed: str) -> NoReturn:
        raise damaged(path, observed, f"a TextGrid with an interval tier {tier!r}")

    if values[:2] != ["ooTextFile", "TextGrid"]:
        fail("no TextGrid header")
    seen: list[str] = []
    at = 5  # header, start, end, number of tiers
    while at + 4 < len(values):
        kind, name, number = values[at], values[at + 1], values[at + 4]
        width = {"IntervalTier": 3, "TextTier": 2}.get(str(kind))
        if width is None or not isinstance(number, float):
            fail(f"tier {len(seen) + 1} of kind {kind!r}")
        body = values[at + 5 : at + 5 + width * int(number)]
        if len(body) < width * int(number):
            fail(f"{len(body) // width} of {int(number)} entries in tier {name!r}")
        if name == tier and width == 3:
            return _intervals(body, fail)
        seen.append(str(name))
        at += 5 + width * int(number)
    fail(f"tiers {', '.join(seen) or 'none'}")


def _intervals(body: list[str | float], fail: Callable[[str], NoReturn]) -> tuple[Interval, ...]:
    found = []
    for start, end, label in zip(body[::3], body[1::3], body[2::3], strict=True):
        if not (isinstance(start, float) and isinstance(end, float) and isinstance(label, str)):
            fail(f"an entry {start!r}, {end!r}, {label!r}")
        found.append(Interval(start, end, label))
    return tuple(found)
