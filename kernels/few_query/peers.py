"""Attention of others as backends of :func:`attnbench.kernels.few_query`: SDPA's kernels and flex.

They are those of dense attention: SDPA's flash kernel splits the keys by itself where queries are few, and
flex has a decoding kernel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.flash import flash


def _few_query(peer: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute with a peer of dense attention; what that cannot serve is Unsupported under this op's name."""
    try:
        return flash(q, k, v, **options, backend=peer)
    except Unsupported as why:
        what = why.what.replace("flash/", "few_query/", 1)
        raise Unsupported(what, why.observed, why.expected) from why


sdpa_math = partial(_few_query, "sdpa_math")
sdpa_flash = partial(_few_query, "sdpa_flash")
sdpa_efficient = partial(_few_query, "sdpa_efficient")
sdpa_cudnn = partial(_few_query, "sdpa_cudnn")
flex = partial(_few_query, "flex")
