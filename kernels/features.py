"""Elementwise feature maps of linear attention, shared by the reference and torch backends of two ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def feature(u: Tensor, name: str) -> Tensor:
    """φ(u) elementwise; ``name`` as in :func:`attnbench.kernels.kv_reduce`. ValueError for another name."""
    match name:
        case "identity":
            return u
        case "elu1":
            return F.elu(u) + 1
        case "relu":
            return F.relu(u)
        case "squared_relu":
            return F.relu(u).square()
        case "exp":
            return torch.exp(u)
    raise ValueError(f"unknown feature map {name!r}: expected identity, elu1, relu, squared_relu or exp")


def guarded(den: Tensor, eps: float, mode: str) -> Tensor:
    """The denominator with its guard: den + eps (``"add"``) or max(den, eps) (``"max"``)."""
    return den + eps if mode == "add" else den.clamp_min(eps)
