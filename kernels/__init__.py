"""Operations on (B, H, N, D) tensors, each with a reference, a torch and a Triton backend, and peers.

One strong operation serves many mechanisms; a mechanism never re-implements what stands here.
"""

from attnbench.kernels.backends import Op, Support, Unsupported, available, recording
from attnbench.kernels.block_mass import OP as _BLOCK_MASS
from attnbench.kernels.block_mass import block_mass
from attnbench.kernels.block_sparse import OP as _BLOCK_SPARSE
from attnbench.kernels.block_sparse import block_sparse
from attnbench.kernels.flash import OP as _FLASH
from attnbench.kernels.flash import flash, merge, padding_bias
from attnbench.kernels.kv_reduce import OP as _KV_REDUCE
from attnbench.kernels.kv_reduce import kv_reduce
from attnbench.kernels.linrec import OP as _LINREC
from attnbench.kernels.linrec import linrec
from attnbench.kernels.selection import Selection

OPS: dict[str, Op] = {op.name: op for op in (_BLOCK_MASS, _BLOCK_SPARSE, _FLASH, _KV_REDUCE, _LINREC)}
"""Every operation by name."""

__all__ = [
    "OPS",
    "Op",
    "Selection",
    "Support",
    "Unsupported",
    "available",
    "block_mass",
    "block_sparse",
    "flash",
    "kv_reduce",
    "linrec",
    "merge",
    "padding_bias",
    "recording",
]
