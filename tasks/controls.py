"""Controls: what a model scores without attention, so that a mechanism's score means something.

They are no mechanisms and stand in no registry; tasks accept them by name. Imports no torch until one is
built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnbench.impls import registry
from attnbench.impls.spec import Pattern

if TYPE_CHECKING:
    from attnbench.impls.base import Attention
    from attnbench.tasks.base import Shape

NAMES = ("no_mixing", "uniform")
"""``no_mixing``: no token sees another. ``uniform``: tokens are averaged, without any addressing."""
EXACT = ("torch", "sdpa_flash")
"""Backends of softmax that every task runs beside the mechanism: two exact forms whose scores must tie."""


def attention_class(name: str) -> type[Attention]:
    """The class of a control or else of a mechanism. Raises UsageError for an unknown name."""
    if name in NAMES:
        from attnbench.tasks import control_modules

        found: type[Attention] = {
            kind.spec.id: kind for kind in (control_modules.NoMixing, control_modules.Uniform)
        }[name]
        return found
    return registry.mechanism(name)


def why_not(mechanism: str, task: str) -> str:
    """Why no task can train ``mechanism``, empty when it can: tasks give x and a context, and no more."""
    needed = [declared.name for declared in attention_class(mechanism).spec.served_inputs("layer")]
    if not needed:
        return ""
    return f"task {task} gives x and a context: {mechanism} needs {', '.join(needed)} besides"


def build_attention(
    name: str,
    embed_dim: int,
    num_heads: int,
    *,
    pattern: Pattern | str,
    backend: str = "auto",
    n: int,
    m: int,
    **hyper: Any,
) -> Attention:
    """Build a control or a mechanism for N queries and M keys, as a module (B, N, C) → (B, N, C).

    Hyper-parameters that the lengths determine are filled in unless given. Raises UsageError for an unknown
    name or hyper-parameter and for a pattern or backend that it does not have.
    """
    kind = attention_class(name)
    options = {**kind.for_length(n, m), **hyper}
    return kind(embed_dim, num_heads, pattern=pattern, backend=backend, **options)


def softmax(shape: Shape, pattern: Pattern | str, backend: str = "auto") -> Attention:
    """Softmax attention of ``shape``: what stands everywhere in a model but where a mechanism is tested."""
    w = shape.workload
    return build_attention(
        "softmax", w.width, w.heads, pattern=pattern, backend=backend, n=shape.n, m=shape.m
    )
