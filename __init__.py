"""attnbench: benchmark attention mechanisms for latency, memory, FLOPs and accuracy.

The public API, imported lazily: ``import attnbench`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnbench.errors import AttnbenchError, AttnbenchWarning, UsageError

if TYPE_CHECKING:
    from attnbench.harness.analysis import attention_map
    from attnbench.harness.run import run
    from attnbench.impls.base import Attention, MapAttention, MaskAttention, SparseAttention
    from attnbench.impls.registry import attention, build, list_impls, spec
    from attnbench.impls.spec import Hyper, Input, Paper, Pattern, Spec
    from attnbench.results.read import load

__version__ = "0.1.0"

_LAZY = {
    "Attention": "attnbench.impls.base",
    "MapAttention": "attnbench.impls.base",
    "MaskAttention": "attnbench.impls.base",
    "SparseAttention": "attnbench.impls.base",
    "Hyper": "attnbench.impls.spec",
    "Input": "attnbench.impls.spec",
    "Paper": "attnbench.impls.spec",
    "Pattern": "attnbench.impls.spec",
    "Spec": "attnbench.impls.spec",
    "attention": "attnbench.impls.registry",
    "attention_map": "attnbench.harness.analysis",
    "build": "attnbench.impls.registry",
    "list_impls": "attnbench.impls.registry",
    "load": "attnbench.results.read",
    "run": "attnbench.harness.run",
    "spec": "attnbench.impls.registry",
}

__all__ = [
    "Attention",
    "AttnbenchError",
    "AttnbenchWarning",
    "Hyper",
    "Input",
    "MapAttention",
    "MaskAttention",
    "Paper",
    "Pattern",
    "SparseAttention",
    "Spec",
    "UsageError",
    "__version__",
    "attention",
    "attention_map",
    "build",
    "list_impls",
    "load",
    "run",
    "spec",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'attnbench' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
