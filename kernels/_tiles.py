"""What the Triton kernels of the two linear operations share: features, dot operands, row terms, launches.

Addresses are a 64-bit base of a tile and 32-bit offsets inside it: 64-bit offsets cost two registers each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Target:
    """What the launches depend on: compute capability (90 for 9.0) and streaming multiprocessors to fill."""

    capability: int
    processors: int


def target(device: torch.device) -> Target:
    """The target of a device; one Hopper multiprocessor where there is no GPU, as under the interpreter."""
    if device.type != "cuda":
        return Target(90, 1)
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


class Launch(NamedTuple):
    """A kernel with the arguments of one launch, so that the same description runs or compiles it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch on the device of the first argument, a tensor, and on its current stream."""
        with torch.cuda.device_of(self.args[0]):
            self.kernel[self.grid](*self.args, **self.options)


def strided(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Each tensor followed by its strides; None twice for one that is absent."""
    return tuple(x for t in tensors for x in ((None, None) if t is None else (t, t.stride())))


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for fp32 tiles, as ``torch.set_float32_matmul_precision`` asks."""
    if dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"  # three tensor-core products keep fp32 accuracy; "ieee" would leave the tensor cores
    return "tf32"


def addressable(x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a contiguous copy where offsets inside a tile of rows and columns exceed 32 bits."""
    return x if x is None or max(x.stride()[2:]) <= 2**22 else x.contiguous()


@triton.jit
def phi(u, FEATURE: tl.constexpr):
    """φ(u) of an fp32 tile."""
    if FEATURE == "elu1":
        u = tl.where(u > 0, u + 1, tl.exp(tl.minimum(u, 0)))
    elif FEATURE == "relu":
        u = tl.maximum(u, 0)
    elif FEATURE == "squared_relu":
        u = tl.maximum(u, 0) * tl.maximum(u, 0)
    elif FEATURE == "exp":
        u = tl.exp(u)
    return u


@triton.jit
def phi_grad(u, FEATURE: tl.constexpr):
    """φ'(u) of an fp32 tile; at the kinks as PyTorch has it."""
    if FEATURE == "elu1":
        u = tl.where(u > 0, 1.0, tl.exp(tl.minimum(u, 0)))
    elif FEATURE == "relu":
        u = tl.where(u > 0, 1.0, 0.0)
    elif FEATURE == "squared_relu":
        u = 2 * tl.maximum(u, 0)
    elif FEATURE == "exp":
        u = tl.exp(u)
    else:
        u = tl.full(u.shape, 1.0, tl.float32)
    return u


@triton.jit
def tile_at(base, strides, b, h, first):
    """Address of row ``first`` of one (batch, head) of a (B, H, N) or (B, H, N, D) tensor; indices int64."""
    return base + b * strides[0] + h * strides[1] + first * strides[2]


@triton.jit
def load_tile(base, strides, rows, cols, row_live, COLS: tl.constexpr):
    """The tile at ``rows`` (relative to base) and ``cols``, 0 where a row is dead or a column past COLS."""
    at = base + (rows[:, None] * strides[2] + cols[None, :] * strides[3])
    return tl.load(at, mask=row_live[:, None] & (cols < COLS)[None, :], other=0.0)


@triton.jit
def load_features(base, strides, rows, cols, row_live, COLS: tl.constexpr, FEATURE: tl.constexpr):
    """As load_tile with φ applied, rounded to the input dtype; dead entries are 0 though φ(0) may not be."""
    u = load_tile(base, strides, rows, cols, row_live, COLS)
    if FEATURE == "identity":
        return u
    live = row_live[:, None] & (cols < COLS)[None, :]
    return tl.where(live, phi(u.to(tl.float32), FEATURE), 0.0).to(u.dtype)


@triton.jit
def load_state(at, rows, cols, D: tl.constexpr, DV: tl.constexpr):
    """The (rows, cols) tile of one flat state."""
    mask = (rows < D)[:, None] & (cols < DV)[None, :]
    return tl.load(at + rows[:, None] * DV + cols[None, :], mask=mask, other=0.0)


@triton.jit
def operand(x, DTYPE: tl.constexpr):
    """An fp32 tile as an operand of a dot in DTYPE, and the scalar to multiply the product by.

    fp16 holds neither a state summed over many steps nor a gradient divided by a large normaliser, so there
    the tile is scaled by its largest entry.
    """
    # One reduction over both axes: two in a row break Triton 3.7's tensor-memory pass for sm_100.
    if DTYPE == tl.float16:  # noqa: SIM300
        top = tl.max(tl.abs(x))
        factor = tl.where(top > 1e-30, top, 1.0)
        return (x * (1.0 / factor)).to(DTYPE), factor
    return x.to(DTYPE), 1.0


@triton.jit
def guarded(den, eps, EPS_ADD: tl.constexpr):
    """The denominator with its guard: den + eps, or max(den, eps)."""
    return den + eps if EPS_ADD else tl.maximum(den, eps)


@triton.jit
def row_terms_kernel(
    o, o_s, do, do_s, den, inverse, d_den, heads, n, eps, DV: tl.constexpr, BR: tl.constexpr,
    BV: tl.constexpr, EPS_ADD: tl.constexpr,
):  # fmt: skip
    """1/den and dL/d(den) of every row, (B, H, N) fp32, from the normalised output o and its gradient."""
    blocks = tl.cdiv(n, BR)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    first = ((tl.program_id(0) % blocks) * BR).to(tl.int64)
    rows, cols = tl.arange(0, BR), tl.arange(0, BV)
    live = first + rows < n
    b, h = bh // heads, bh % heads
    x = load_tile(tile_at(o, o_s, b, h, first), o_s, rows, cols, live, DV).to(tl.float32)
    dx = load_tile(tile_at(do, do_s, b, h, first), do_s, rows, cols, live, DV).to(tl.float32)
    row = bh * n + first + rows
    raw = tl.load(den + row, mask=live, other=1.0)
    inv = 1.0 / guarded(raw, eps, EPS_ADD)
    grad = -inv * tl.sum(x * dx, 1)
    if not EPS_ADD:
        grad = tl.where(raw >= eps, grad, 0.0)
    tl.store(inverse + row, inv, mask=live)
    tl.store(d_den + row, grad, mask=live)


def row_terms(
    o: torch.Tensor, do: torch.Tensor, den: torch.Tensor, eps: float, eps_mode: str
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch that fills 1/den and the gradient of den, and those two tensors (B, H, N)."""
    b, h, n, dv = o.shape
    inverse, d_den = torch.empty_like(den), torch.empty_like(den)
    args = (o, o.stride(), do, do.stride(), den, inverse, d_den, h, n, eps)
    options = {"DV": dv, "BR": 32, "BV": triton.next_power_of_2(dv), "EPS_ADD": eps_mode == "add"}
    grid = (b * h * triton.cdiv(n, 32),)
    return Launch(row_terms_kernel, grid, args, options | {"num_warps": 4}), inverse, d_den
