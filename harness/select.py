"""From ``--impl`` to pairs (mechanism, backend): ids, ``id/backend``, globs, ``family:…``, ``all``, files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from attnbench.errors import AttnbenchError, UsageError, unknown_name
from attnbench.impls import registry
from attnbench.impls.spec import Pattern
from attnbench.tasks import controls

BEST = "best"
"""Backend of a bare mechanism: the best that the device has, decided per pattern by :func:`backends_of`."""

EVERY = "*"
"""Backend of ``all``: every one that the mechanism has."""


@dataclass(frozen=True)
class Selected:
    """One mechanism and the backend asked for: a name, :data:`BEST` or :data:`EVERY`."""

    mechanism: str
    backend: str


def select(selectors: Sequence[str], further: Sequence[str] = ()) -> list[Selected]:
    """Expand the selectors, in order and without repetition.

    ``further`` are names that are accepted as they are. Raises UsageError for a name that does not
    exist, a glob that matches nothing, a backend that the mechanism does not have.
    """
    chosen: dict[Selected, None] = {}
    for selector in selectors:
        for found in _expand(selector.strip(), further):
            chosen[found] = None
    return list(chosen)


def backends_of(selected: Selected, pattern: str, device: str) -> tuple[str, ...]:
    """Backends to plan under ``pattern``; none when the mechanism has not the one that was named there."""
    kind = registry.mechanism(selected.mechanism)
    have = kind.backends(pattern)
    if selected.backend == EVERY:  # the reference is the definition and races with nobody unless it is named
        return tuple(name for name in have if name != "reference")
    if selected.backend != BEST:
        return (selected.backend,) if selected.backend in have else ()
    order = ("torch", "reference") if device == "cpu" else ("triton", "torch", "reference")
    return tuple(name for name in order if name in have)[:1]


def _expand(selector: str, further: Sequence[str]) -> list[Selected]:
    if selector == "all":
        return [Selected(name, EVERY) for name in registry.ids()]
    if selector.startswith("family:"):
        return [
            Selected(name, EVERY) for name in registry.list_impls(family=selector.removeprefix("family:"))
        ]
    name, slash, backend = _split(selector)
    if name in further:
        return [Selected(name, backend if slash else BEST)]
    if ".py:" in name:
        _load(name)
        return [Selected(name, backend if slash else BEST)]
    if any(sign in selector for sign in "*?["):
        return _glob(selector, name, backend if slash else BEST)
    _load(name)
    _check_backend(name, backend if slash else BEST)
    return [Selected(name, backend if slash else BEST)]


def foreign(selectors: Sequence[str]) -> list[str]:
    """The selectors that name code from outside this project: files and plug-ins, by name. Loads none."""
    own = {"all", *registry.ids(), *controls.NAMES}
    return [
        selector
        for selector in selectors
        if ".py:" in selector
        or not (
            _split(selector)[0] in own
            or selector.startswith("family:")
            or any(sign in selector for sign in "*?[")
        )
    ]


def _load(name: str) -> None:
    """Load the code behind a name; a file or plug-in that cannot be is the user's error, not ours."""
    try:
        registry.mechanism(name)
    except (AttnbenchError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if not foreign([name]):
            raise
        raise UsageError(
            f"--impl {name}: it cannot be loaded: {type(error).__name__}: {error}; "
            "run it with python to see more"
        ) from error


def _split(selector: str) -> tuple[str, str, str]:
    """(mechanism, "/" or "", backend); the slashes of a file's path belong to the path."""
    if ".py:" in selector:
        path, _, rest = selector.rpartition(".py:")
        class_name, slash, backend = rest.partition("/")
        return f"{path}.py:{class_name}", slash, backend
    return selector.partition("/")


def _glob(selector: str, name: str, backend: str) -> list[Selected]:
    names = [known for known in registry.ids() if fnmatchcase(known, name)]
    if backend in (BEST, EVERY):
        found = [Selected(known, backend) for known in names]
    else:
        found = [Selected(n, b) for n in names for b in _all_backends(n) if fnmatchcase(b, backend)]
    if not found:
        raise UsageError(
            f"--impl {selector!r} matches nothing: `attnbench list` shows the mechanisms and their backends"
        )
    return found


def _all_backends(name: str) -> tuple[str, ...]:
    kind = registry.mechanism(name)
    return tuple(dict.fromkeys(b for pattern in kind.spec.patterns for b in kind.backends(pattern)))


def _check_backend(name: str, backend: str) -> None:
    names = _all_backends(name)  # raises for an unknown mechanism
    if backend not in (BEST, *names):
        raise unknown_name(f"backend of {name}", backend, names)


def patterns_of(selected: Selected, wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted patterns that the mechanism has, in the order of the taxonomy."""
    have = registry.mechanism(selected.mechanism).spec.patterns
    return tuple(p for p in Pattern if p in have and p in wanted)
