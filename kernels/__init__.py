"""Operations on (B, H, N, D) tensors, each with a reference, a torch and a Triton backend, and peers.

One strong operation serves many mechanisms; a mechanism never re-implements what stands here.
"""

from attnbench.kernels.backends import Op, Support, Unsupported, available, recording
from attnbench.kernels.block_mass import OP as _BLOCK_MASS
from attnbench.kernels.block_mass import block_mass
from attnbench.kernels.block_sparse import OP as _BLOCK_SPARSE
from attnbench.kernels.block_sparse import block_sparse
from attnbench.kernels.buckets import OP as _BUCKETS
from attnbench.kernels.buckets import Buckets, buckets
from attnbench.kernels.few_query import OP as _FEW_QUERY
from attnbench.kernels.few_query import few_query
from attnbench.kernels.flash import OP as _FLASH
from attnbench.kernels.flash import Mask, RelativeBias, flash, merge, padding_bias
from attnbench.kernels.flash_int8 import OP as _FLASH_INT8
from attnbench.kernels.flash_int8 import flash_int8
from attnbench.kernels.gather import OP as _GATHER
from attnbench.kernels.gather import gather
from attnbench.kernels.kv_reduce import OP as _KV_REDUCE
from attnbench.kernels.kv_reduce import kv_reduce
from attnbench.kernels.linrec import OP as _LINREC
from attnbench.kernels.linrec import linrec
from attnbench.kernels.neighborhood import OP as _NEIGHBORHOOD
from attnbench.kernels.neighborhood import Neighborhood, neighborhood
from attnbench.kernels.query_softmax import OP as _QUERY_SOFTMAX
from attnbench.kernels.query_softmax import Assignment, query_softmax
from attnbench.kernels.selection import Selection
from attnbench.kernels.selective_scan import OP as _SELECTIVE_SCAN
from attnbench.kernels.selective_scan import selective_scan
from attnbench.kernels.tensor3 import OP as _TENSOR3
from attnbench.kernels.tensor3 import tensor3
from attnbench.kernels.token_blocks import OP as _TOKEN_BLOCKS
from attnbench.kernels.token_blocks import token_blocks
from attnbench.kernels.token_selection import SharedKeys, TokenBlocks, TokenKeys
from attnbench.kernels.window import OP as _WINDOW
from attnbench.kernels.window import Partition, window

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _BLOCK_MASS,
        _BLOCK_SPARSE,
        _BUCKETS,
        _FEW_QUERY,
        _FLASH,
        _FLASH_INT8,
        _GATHER,
        _KV_REDUCE,
        _LINREC,
        _NEIGHBORHOOD,
        _QUERY_SOFTMAX,
        _SELECTIVE_SCAN,
        _TENSOR3,
        _TOKEN_BLOCKS,
        _WINDOW,
    )
}
"""Every operation by name."""

__all__ = [
    "OPS",
    "Assignment",
    "Buckets",
    "Mask",
    "Neighborhood",
    "Op",
    "Partition",
    "RelativeBias",
    "Selection",
    "SharedKeys",
    "Support",
    "TokenBlocks",
    "TokenKeys",
    "Unsupported",
    "available",
    "block_mass",
    "block_sparse",
    "buckets",
    "few_query",
    "flash",
    "flash_int8",
    "gather",
    "kv_reduce",
    "linrec",
    "merge",
    "neighborhood",
    "padding_bias",
    "query_softmax",
    "recording",
    "selective_scan",
    "tensor3",
    "token_blocks",
    "window",
]
