"""q, k, v recorded from a small trained language model, fitted to the shape that a case asks for.

``recorded_qkv.npz`` was written by ``scripts/record_qkv.py``: every head of every layer, on text that the
model was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.tasks.data.structured import positions

PATH = Path(__file__).with_name("recorded_qkv.npz")


@dataclass(frozen=True)
class Recording:
    """q, k, v, each (heads, tokens, D) fp32 with D = 32; ``meta`` says how they came about.

    ``heads`` are all heads of all layers, layer by layer. ``tokens`` are ``meta["sequences"]`` windows of
    ``meta["context"]`` tokens one after the other; scores are meant to be scaled by 1/√D.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    meta: Mapping[str, Any]


def digest(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 over the bytes of q, k and v."""
    found = hashlib.sha256()
    for name in ("q", "k", "v"):
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


@cache
def recording(path: Path = PATH) -> Recording:
    """Load the recording, on the CPU. Raises UsageError when the file is absent or was changed."""
    if not path.is_file():
        raise UsageError(
            f"observed no {path}, expected the recording that ships with attnbench: reinstall it"
        )
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in ("q", "k", "v")}
        meta = json.loads(str(stored["meta"]))
    if digest(arrays) != meta["sha256"]:
        raise UsageError(
            f"{path}: its content does not have the SHA-256 in its meta data; reinstall attnbench"
        )
    q, k, v = (_by_head(torch.from_numpy(arrays[name]).float()) for name in ("q", "k", "v"))
    return Recording(q, k, v, meta)


def _by_head(x: Tensor) -> Tensor:
    """(sequences, layers, heads, context, D) → (layers·heads, sequences·context, D)."""
    return x.flatten(1, 2).transpose(0, 1).flatten(1, 2)


def recorded_qkv(
    b: int,
    h: int,
    hkv: int,
    n: int,
    m: int,
    d: int,
    dv: int,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, N, D), keys (B, Hkv, M, D), values (B, Hkv, M, Dv), fp32, for scores scaled by 1/√D.

    What is asked for is made from what was recorded as follows.

    - Tokens: queries and keys are read off one timeline of max(N, M) tokens (all of them when N = M, see
      ``structured.positions``). Batch element i starts at the beginning of window i, runs on through the
      following windows and starts over after the last: beyond ``sequences·context`` tokens keys repeat.
      Positions restart with every window, as they did in the model.
    - Heads: key heads take recorded heads in turn, in an order drawn from ``generator``; all query heads of
      a group are the recorded query head of their key head (the model has no grouped heads).
    - D above the recorded one: q and k are embedded by one isometry and q is multiplied by √(D/32), which
      leaves the scaled scores as they were. D below: the best approximation of each head's q kᵀ of rank D
      (truncated singular value decomposition). v: an isometry, or its leading principal directions.
    - Noncausal patterns: scores of later keys are what the model would have computed; it never used them.
    """
    source = _fitted(d, dv)
    heads, windows = source.q.shape[0], source.meta["sequences"]
    order = torch.randperm(heads, generator=generator, device=device).cpu()
    length, total = max(n, m), source.q.shape[1]
    cpu = torch.device("cpu")
    rows, columns = positions(n, length, cpu), positions(m, length, cpu)
    batch = torch.arange(b)
    start = (batch % windows) * source.meta["context"]
    head = order[(torch.arange(hkv)[None] + (batch // windows)[:, None]) % heads]
    q_tokens, k_tokens = ((start[:, None] + at) % total for at in (rows, columns))
    q_head = head.repeat_interleave(h // hkv, 1)
    q = source.q[q_head[..., None], q_tokens[:, None]]
    k = source.k[head[..., None], k_tokens[:, None]]
    v = source.v[head[..., None], k_tokens[:, None]]
    return q.to(device), k.to(device), v.to(device)


@cache
def _fitted(d: int, dv: int) -> Recording:
    raw = recording()
    q, k = _fit_scores(raw.q, raw.k, d)
    return Recording(q, k, _fit_values(raw.v, dv), raw.meta)


def _fit_scores(q: Tensor, k: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """q, k with D columns whose scaled scores are those recorded, or the nearest of rank D."""
    recorded = q.shape[-1]
    scale = math.sqrt(d / recorded)
    if d >= recorded:
        basis = _isometry(recorded, d)
        return scale * (q @ basis), k @ basis
    q_basis, q_factor = torch.linalg.qr(q.double())
    k_basis, k_factor = torch.linalg.qr(k.double())
    left, values, right = torch.linalg.svd(q_factor @ k_factor.transpose(-1, -2))
    root = values[:, None, :d].sqrt()
    fitted_q = q_basis @ (left[..., :d] * root)
    fitted_k = k_basis @ (right.transpose(-1, -2)[..., :d] * root)
    return (scale * fitted_q).float(), fitted_k.float()


def _fit_values(v: Tensor, dv: int) -> Tensor:
    recorded = v.shape[-1]
    if dv >= recorded:
        return v @ _isometry(recorded, dv)
    directions = torch.linalg.svd(v.double(), full_matrices=False).Vh[:, :dv]
    return (v.double() @ directions.transpose(-1, -2)).float()


def _isometry(rows: int, columns: int) -> Tensor:
    """A fixed matrix (rows, columns) with orthonormal rows; the identity when it is square."""
    if rows == columns:
        return torch.eye(rows)
    drawn = torch.randn(columns, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T.float()
