"""Checks of what is selected, and of maps: the consumer computes what the selection or the map says."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Instance, Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe, Size, same
from attnbench.impls.base import MapAttention, SparseAttention, softmax_map
from attnbench.impls.spec import Pattern


def selection_is_attended(probe: Probe) -> NotApplicable | None:
    """Attending to a selection is softmax attention under its dense mask, with that log-sum-exp."""
    if probe.spec.selection != "softmax":
        return NotApplicable(f"Spec.selection is {probe.spec.selection or 'empty'}")
    if not issubclass(probe.target.mechanism, SparseAttention):
        return NotApplicable("select and consume are those of SparseAttention")

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size, batch=2))
        selection = instance.selection()
        main, keywords = instance.split(instance.inputs)
        q, k, v = main[0], *instance.module.grouped(*main[1:])
        expected, lse = _under(dense_mask(selection, q), q, k, v, probe.target.pattern is Pattern.CS)
        got = instance(selection=selection)
        same(got, expected, f"N, M = {size}: output beside softmax attention under to_dense_mask()")
        with torch.no_grad():
            _, own = instance.module.consume(q, k, v, selection, **keywords)  # type: ignore[operator]
        if own is not None:
            kept = lse.isfinite()
            if not torch.equal(own.isfinite(), kept):
                raise CheckFailed(f"N, M = {size}: a finite lse where no key is kept", "−inf there")
            same(own[kept], lse[kept].to(own.dtype), f"N, M = {size}: log-sum-exp of the kept scores")

    sizes = probe.sizes()[1:]
    probe.served(probe.fewer(sizes, sizes[-1:], "N, M"), check, "N, M")
    return None


def dense_mask(selection: object, q: Tensor) -> Tensor:
    """``to_dense_mask()`` with the heads of q: bool (B or 1, H, N, M). CheckFailed for another shape."""
    to_mask = getattr(selection, "to_dense_mask", None)
    if to_mask is None:
        raise CheckFailed(f"select returned {type(selection).__name__}", "a value with to_dense_mask()")
    mask: Tensor = to_mask()
    heads = q.shape[1]
    fits = mask.dim() == 4 and mask.shape[0] in (1, q.shape[0]) and heads % mask.shape[1] == 0
    if mask.dtype is not torch.bool or not fits or mask.shape[2] != q.shape[2]:
        raise CheckFailed(
            f"to_dense_mask() is {tuple(mask.shape)} {mask.dtype}", f"bool (B, Hs, {q.shape[2]}, M)"
        )
    return mask.repeat_interleave(heads // mask.shape[1], 1)


def _under(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp over the kept pairs, in fp64; a row without one is 0 and −inf."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    n, m = scores.shape[-2:]
    if causal:
        mask = mask & ~torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    empty = lse == -torch.inf
    weights = (scores - lse.masked_fill(empty, 0.0).unsqueeze(-1)).exp()
    return (weights @ v.double()).to(q.dtype), lse


def select_needs_no_host(probe: Probe) -> NotApplicable | None:
    """Select and consume never wait for the device: no size depends on what a tensor contains."""
    if not issubclass(probe.target.mechanism, SparseAttention):
        return NotApplicable("nothing is selected by select(q, k)")
    if probe.target.device != "cuda":
        return NotApplicable("waiting for the device shows on a GPU only")
    n, m = probe.sizes()[-1]
    instance = probe.build(Shape(n, m))
    instance()  # compiles and fills caches, which may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        instance()
    except RuntimeError as error:
        if "synchron" not in str(error):
            raise
        raise CheckFailed(str(error).splitlines()[0], "no synchronisation with the host") from None
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def map_is_applied(probe: Probe) -> NotApplicable | None:
    """The output of a map mechanism is its transformed softmax map times v, however it is computed."""
    if not issubclass(probe.target.mechanism, MapAttention):
        return NotApplicable(f"Spec.kind is {probe.spec.kind}: no map is transformed")

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size, batch=2))
        same(instance(), _applied(instance, probe), f"N, M = {size}: output beside transform(softmax) v")

    sizes = probe.sizes()
    probe.served(probe.fewer(sizes, sizes[-1:], "N, M"), check, "N, M")
    return None


def _applied(instance: Instance, probe: Probe) -> Tensor:
    main, keywords = instance.split(instance.inputs)
    q, k, v = main[0], *instance.module.grouped(*main[1:])
    module = instance.module
    assert isinstance(module, MapAttention)
    with torch.no_grad():
        weights = softmax_map(q, k, causal=probe.target.pattern is Pattern.CS)
        return (module.transform(weights, **keywords).to(v.dtype) @ v).to(q.dtype)


CHECKS = (selection_is_attended, select_needs_no_host, map_is_applied)
