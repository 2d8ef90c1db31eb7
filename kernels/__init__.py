"""Operations on (B, H, N, D) tensors, each with a reference, a torch and a Triton backend, and peers.

One strong operation serves many mechanisms; a mechanism never re-implements what stands here.
"""

from attnbench.kernels.backends import Op, Support, Unsupported, available, recording
from attnbench.kernels.flash import OP as _FLASH
from attnbench.kernels.flash import flash, merge, padding_bias
from attnbench.kernels.kv_reduce import OP as _KV_REDUCE
from attnbench.kernels.kv_reduce import kv_reduce
from attnbench.kernels.linrec import OP as _LINREC
from attnbench.kernels.linrec import linrec

OPS: dict[str, Op] = {op.name: op for op in (_FLASH, _KV_REDUCE, _LINREC)}
"""Every operation by name."""

__all__ = [
    "OPS",
    "Op",
    "Support",
    "Unsupported",
    "available",
    "flash",
    "kv_reduce",
    "linrec",
    "merge",
    "padding_bias",
    "recording",
]
