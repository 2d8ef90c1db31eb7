"""From a name to a mechanism: the files of the family folders, entry points, and a user's file.py:Class.

Adding a mechanism is adding a file: its name is the id. Listing ids imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.errors import UsageError, unknown_name
from attnbench.impls.spec import Pattern, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.impls.base import Attention

FAMILIES = ("dense", "linear", "sparse", "vision", "cross")
ENTRY_POINTS = "attnbench.impls"


@cache
def _files() -> Mapping[str, str]:
    """Mechanism id → module name, from the files of the family folders."""
    here = Path(__file__).parent
    return {
        path.stem: f"attnbench.impls.{family}.{path.stem}"
        for family in FAMILIES
        for path in sorted((here / family).glob("*.py"))
        if not path.stem.startswith("_")
    }


def _published() -> Mapping[str, EntryPoint]:
    """Mechanism id → entry point of an installed package; nothing is imported."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def ids() -> list[str]:
    """Ids of the mechanisms of this project, by family and then by name; imports no torch."""
    return list(_files())


def family_of(mechanism: str) -> str:
    """Family folder of a mechanism of this project; ``user`` for any other."""
    module = _files().get(mechanism)
    return module.split(".")[-2] if module else "user"


def mechanism(name: str) -> type[Attention]:
    """The class behind an id, an entry point or ``path/to/file.py:Class``.

    A file is executed, an entry point imported, only because it was named here. Raises UsageError for an
    unknown name (with near spellings), a missing file or a class that is not an Attention.
    """
    if ".py:" in name:
        return _from_file(name)
    if name in _files():
        return _only_attention(importlib.import_module(_files()[name]), name)
    published = _published()
    if name in published:
        return _checked(published[name].load(), name)
    raise unknown_name("mechanism", name, [*_files(), *published], "`attnbench list` shows them all.")


def spec(name: str) -> Spec:
    """The :class:`Spec` of a mechanism. Raises UsageError for an unknown name."""
    return mechanism(name).spec


def list_impls(family: str | None = None, pattern: Pattern | str | None = None) -> list[str]:
    """Ids of the mechanisms, of one family and with one pattern when given.

    Raises UsageError for an unknown family or pattern.
    """
    if family is not None and family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    if pattern is not None and pattern not in [p.value for p in Pattern]:
        raise unknown_name("pattern", str(pattern), [p.value for p in Pattern])
    chosen = [name for name in ids() if family in (None, family_of(name))]
    if pattern is None:
        return chosen
    return [name for name in chosen if pattern in spec(name).patterns]


def build(
    name: str,
    embed_dim: int,
    num_heads: int,
    *,
    pattern: Pattern | str = Pattern.NS,
    backend: str = "auto",
    **hyper: Any,
) -> Attention:
    """Build a mechanism as a module (B, N, C) → (B, N, C); arguments as in :class:`Attention`."""
    return mechanism(name)(embed_dim, num_heads, pattern=pattern, backend=backend, **hyper)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    impl: str = "softmax",
    pattern: Pattern | str = Pattern.NS,
    backend: str = "auto",
    grid: tuple[int, ...] | None = None,
    **options: Any,
) -> Tensor:
    """One call of a mechanism on tensors: q (B, H, N, D), k and v (B, Hkv, M, ·) → (B, H, N, Dv).

    ``options`` are hyper-parameters and the inputs that the mechanism declares in ``Spec.inputs`` (and
    ``key_padding_mask``, ``grid_kv``). Mechanisms with parameters of their own are built with a fresh
    initialisation each time: use :func:`build` to keep them. Raises UsageError for a mixer, which has no
    operation on q, k and v, and for a declared input that is missing.
    """
    module, inputs = operation(q, k, v, impl, pattern, backend, **options)
    return module.attend(q, *module.grouped(k, v), grid=grid, **inputs)


def operation(
    q: Tensor, k: Tensor, v: Tensor, impl: str, pattern: Pattern | str, backend: str, **options: Any
) -> tuple[Attention, dict[str, Any]]:
    """The module behind one call on q, k, v, and what of ``options`` its ``attend`` takes as keywords."""
    kind = mechanism(impl)
    declared = kind.spec.served_inputs("op")
    takes = {*(x.name for x in declared), "key_padding_mask", "grid_kv"}
    inputs = {name: value for name, value in options.items() if name in takes}
    hyper = {name: value for name, value in options.items() if name not in takes}
    missing = [f"{x.name} {x.shape}: {x.meaning}" for x in declared if x.name not in inputs]
    if missing:
        raise UsageError(f"{kind.spec.id} takes more than q, k, v: observed no {'; no '.join(missing)}")
    heads, head_dim = q.shape[1], q.shape[-1]
    module = kind(
        heads * head_dim,
        heads,
        pattern=pattern,
        backend=backend,
        num_kv_heads=k.shape[1],
        projections=False,
        **{**kind.for_length(q.shape[2], k.shape[2]), **hyper},
    )
    return module.to(q.device, q.dtype), inputs


@cache
def _from_file(target: str) -> type[Attention]:
    path_text, _, class_name = target.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UsageError(f"--impl {target}: observed no file {path}, expected path/to/file.py:Class")
    loader = importlib.util.spec_from_file_location(f"attnbench_user_{path.stem}", path)
    if loader is None or loader.loader is None:
        raise UsageError(f"--impl {target}: {path} cannot be read as a Python module")
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    if not hasattr(module, class_name):
        names = [kind.__name__ for kind in _attentions(module)]
        raise UsageError(
            f"--impl {target}: {path} has no {class_name}; it has {', '.join(names) or 'no Attention'}"
        )
    return _checked(getattr(module, class_name), target)


def _attentions(module: Any) -> Iterator[type[Attention]]:
    from attnbench.impls.base import Attention

    for _, value in inspect.getmembers(module, inspect.isclass):
        if issubclass(value, Attention) and value.__module__ == module.__name__ and hasattr(value, "spec"):
            yield value


@cache
def _only_attention(module: Any, name: str) -> type[Attention]:
    found = [kind for kind in _attentions(module) if kind.spec.id == name]
    if len(found) != 1:
        raise UsageError(
            f"{module.__file__}: observed {len(found)} classes with spec.id {name!r}, expected exactly one"
        )
    return found[0]


def _checked(value: Any, name: str) -> type[Attention]:
    from attnbench.impls.base import Attention

    if not (inspect.isclass(value) and issubclass(value, Attention) and hasattr(value, "spec")):
        raise UsageError(
            f"{name}: observed {value!r}, expected a subclass of attnbench.Attention with a spec"
        )
    return value
