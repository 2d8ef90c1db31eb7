"""The Triton backend of :func:`attnbench.kernels.selective_scan`: checks, autograd and cases to compile.

Parallel over chunks in three passes: what every chunk adds to the state, a scan over the chunks, and the
chunks again from their true initial states. Nothing but the inputs is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import DTYPES
from attnbench.kernels._tiles import Launch, target
from attnbench.kernels.aot import AotCase
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.selective_scan._configs import MAX_SEGMENT, Config, candidates
from attnbench.kernels.selective_scan._launch import Call, Settings
from attnbench.kernels.tuning import pick

MAX_STATE = 256


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor | None,
    reverse: bool,
    segment: int,
    initial_state: Tensor | None,
    need_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute with states in fp32; memory beside the results: ⌈N/32⌉·Ns·E·4 bytes per sequence.

    The backward pass has three such buffers for ⌈N/16⌉ chunks and two of ⌈E/16⌉·N·Ns·4 bytes. Raises
    Unsupported for another dtype, a state above 256 and a segment that is no power of two up to 32.
    """
    tensors = {"u": u, "delta": delta, "a": a, "b": b, "c": c, "skip": skip, "z": z, "delta_bias": delta_bias}
    for name, x in tensors.items():
        if x is not None and (x.dtype not in DTYPES or x.device != u.device):
            raise Unsupported(
                f"selective_scan/triton {name}",
                f"{x.dtype} on {x.device}",
                f"float16, bfloat16 or float32 on {u.device}",
            )
    if a.shape[-1] > MAX_STATE:
        raise Unsupported("selective_scan/triton state size", a.shape[-1], f"at most {MAX_STATE}")
    if segment > MAX_SEGMENT or segment & (segment - 1):
        raise Unsupported("selective_scan/triton segment", segment, f"a power of two up to {MAX_SEGMENT}")
    if order is not None:
        order = order.to(torch.int32)
    settings = Settings(delta_softplus, reverse, segment)
    initial = None if initial_state is None else initial_state.float()
    y, final = _SelectiveScan.apply(u, delta, a, b, c, skip, z, delta_bias, initial, order, settings)
    return y, final if need_state else None


class _SelectiveScan(torch.autograd.Function):
    """y and the final state (B, K, E, Ns), fp32, of one call, and the gradients of the first nine inputs."""

    @staticmethod
    def forward(ctx, u, delta, a, b, c, skip, z, bias, initial, order, settings):
        y = torch.empty(u.shape, device=u.device, dtype=u.dtype)
        call = _call(u, delta, a, b, c, skip, z, bias, order, settings, "forward")
        states = call.empty_states()
        _run(_forward(call, initial, states, y), u)
        ctx.save_for_backward(u, delta, a, b, c, skip, z, bias, initial, order)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return y, states[:, :, -1].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final):
        u, delta, a, b, c, skip, z, bias, initial, order = ctx.saved_tensors
        if do is None and d_final is None:
            return (None,) * 11
        if do is None:
            do = u.new_zeros(()).expand(u.shape)
        call = _call(u, delta, a, b, c, skip, z, bias, order, ctx.settings, "backward")
        states, d_states, out = call.empty_states(), call.empty_states(), call.empty_gradients()
        _run(_backward(call, initial, do, d_final, states, d_states, out), u)
        needs = ctx.needs_input_grad
        return (
            out.du,
            out.d_delta,
            out.d_rates.sum((0, 2)).mT.to(a.dtype) if needs[2] else None,
            out.db.sum(2).to(b.dtype) if needs[3] else None,
            out.dc.sum(2).to(c.dtype) if needs[4] else None,
            out.d_skip.sum((0, 2)).to(skip.dtype) if needs[5] else None,
            out.dz,
            out.d_bias.sum((0, 2)).to(bias.dtype) if needs[7] else None,
            d_states[:, :, 0].mT.contiguous() if needs[8] else None,
            None,
            None,
        )


def _run(launches: list[Launch], u: Tensor) -> None:
    """Launch in order on the device of u."""
    with torch.cuda.device_of(u):
        for launch in launches:
            if launch.grid[0]:
                launch.kernel[launch.grid](*launch.args, **launch.options)


def _forward(call: Call, initial: Tensor | None, states: Tensor, y: Tensor) -> list[Launch]:
    """The three passes; writes the initial state into its slot."""
    _fill(states[:, :, 0], initial)
    return [*call.states(call.empty_sums(), states), call.outputs(states, y)]


def _backward(
    call: Call,
    initial: Tensor | None,
    do: Tensor,
    d_final: Tensor | None,
    states: Tensor,
    d_states: Tensor,
    out,
) -> list[Launch]:
    """The states again, their gradients, and every chunk."""
    _fill(states[:, :, 0], initial)
    _fill(d_states[:, :, -1], d_final)
    sums = call.empty_sums()
    return [
        *call.states(sums, states),
        *call.state_gradients(do, sums, d_states),
        call.gradients(do, states, d_states, out),
    ]


def _fill(slot: Tensor, state: Tensor | None) -> None:
    if state is None:
        slot.zero_()
    else:
        slot.copy_(state.mT)


def _call(u, delta, a, b, c, skip, z, bias, order, settings: Settings, direction: str) -> Call:
    """The call with the configuration that the tuner picks, by default the first candidate."""
    capability = target(u.device).capability
    options = candidates(direction, u.shape[3], settings.segment)
    call = Call(u, delta, a, b, c, skip, z, bias, order, settings, options[0])
    key = (
        capability,
        str(u.dtype),
        a.shape[-1],
        u.shape[3].bit_length(),
        u.shape[2].bit_length(),
        (u.shape[0] * u.shape[1]).bit_length(),
        settings.segment,
    )
    config = pick(
        op="selective_scan",
        kernel=direction,
        key=key,
        candidates=options,
        launch=lambda config: _trial(replace(call, config=config), direction),
        device=u.device,
    )
    return replace(call, config=config)


def _trial(call: Call, direction: str) -> Callable[[], None]:
    """A whole pass of one direction on memory of its own."""
    states = call.empty_states()
    if direction == "forward":
        launches = _forward(call, None, states, torch.empty_like(call.u))
    else:
        gradient = torch.zeros_like(call.u)
        out = call.empty_gradients()
        launches = _backward(call, None, gradient, None, states, call.empty_states(), out)
    return lambda: _run(launches, call.u)


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel, forward and backward, with 16 states: plain in bf16, and with every option in fp32."""
    cases = []
    for dtype, every_option in ((torch.bfloat16, False), (torch.float32, True)):
        name = "every option" if every_option else "plain"
        for launch in _example_launches(dtype, 16, every_option):
            cases.append(AotCase(name, launch.kernel, launch.args, launch.options | {"grid": (1,)}))
    return cases


def _example_launches(dtype: torch.dtype, ns: int, every_option: bool) -> list[Launch]:
    """What a forward and a backward pass launch, for lengths that nothing divides."""
    batch, k, n, e = 2, 2, 1000, 200
    u = torch.empty(batch, k, n, e, dtype=dtype)
    b = torch.empty(batch, k, n, ns, dtype=dtype)
    rates, skip = torch.empty(k, e, ns), torch.empty(k, e)
    order = torch.zeros(k, n, dtype=torch.int32) if every_option else None
    z, bias = (u, skip) if every_option else (None, None)
    settings = Settings(True, every_option, 16 if every_option else 1)

    def call(config: Config) -> Call:
        return Call(u, u, rates, b, b, skip, z, bias, order, settings, config)

    first, second = (call(candidates(way, e, settings.segment)[0]) for way in ("forward", "backward"))
    out = second.empty_gradients()
    launches = _forward(first, None, first.empty_states(), u)
    return launches + _backward(second, None, u, None, second.empty_states(), second.empty_states(), out)
