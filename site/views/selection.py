"""What the selectors of a page offer, and the settings that its script starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnbench.site.views.case import Case
from attnbench.site.views.words import DIRECTION_WORDS, DTYPE_WORDS, PATTERN_WORDS

KEYS: Final = {
    "gpu": ("device", "Device"),
    "dtype": ("dtype", "Number format"),
    "dir": ("direction", "Direction"),
    "pattern": ("pattern", "Pattern"),
    "workload": ("workload", "Workload"),
    "n": ("size", "Length"),
    "scope": ("scope", "Scope"),
    "sw": ("stack", "Software"),
    "seed": ("seed", "Seed"),
}
"""Key in the address → field of a case, and what the selector is called."""

QUIET: Final = ("sw", "seed")
"""Selectors that show only where there is a choice: most data have one software and one seed."""


@dataclass(frozen=True)
class Selector:
    """One selector: its key in the address, its options as (value, text), and the one chosen at first.

    ``idle`` where the choice is none, given the device, dtype and direction chosen at first.
    """

    key: str
    label: str
    options: tuple[tuple[str, str], ...]
    chosen: str
    idle: bool


def selectors(cases: Iterable[Case], chosen: Case) -> tuple[Selector, ...]:
    """A selector for every field of a case, with the values that any case has."""
    known = list(cases)
    found = []
    for key, (field, label) in KEYS.items():
        values = sorted({_value(case, field) for case in known}, key=_order)
        options = tuple((value, _words(field, value)) for value in values)
        near = {_value(case, field) for case in known if _outer(case) == _outer(chosen)}
        idle = len(values) < 2 or (key in QUIET and len(near) < 2)
        found.append(Selector(key, label, options, _value(chosen, field), idle))
    return tuple(found)


def state(case: Case) -> Mapping[str, str]:
    """The case as the keys of the address have it."""
    return {key: _value(case, field) for key, (field, _) in KEYS.items()}


def address(case: Case, default: Case | None) -> str:
    """The fragment that selects ``case``; what is as in ``default`` is left out."""
    usual: Mapping[str, str] = {} if default is None else state(default)
    return "&".join(f"{k}={v}" for k, v in state(case).items() if usual.get(k) != v)


def _outer(case: Case) -> tuple[str, str, str]:
    return case.device, case.dtype, case.direction


def _value(case: Case, field: str) -> str:
    return str(getattr(case, field))


def _words(field: str, value: str) -> str:
    words: Mapping[str, str] = {
        "dtype": DTYPE_WORDS,
        "direction": DIRECTION_WORDS,
        "pattern": PATTERN_WORDS,
    }.get(field, {})
    if field == "pattern" and value in words:
        return f"{value} · {words[value]}"
    return value[:8] if field == "stack" else words.get(value, value)


def _order(value: str) -> tuple[Any, ...]:
    """Sizes by their numbers, other values as texts."""
    parts: Sequence[str] = value.split("x")
    if all(part.isdecimal() for part in parts):
        return (0, *map(int, parts))
    return (1, value)
