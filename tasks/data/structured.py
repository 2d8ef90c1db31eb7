"""Synthetic q, k, v with the structure of trained attention: selections of keys have something to find.

Independent Gaussian vectors give nearly uniform rows, on which every selection of keys scores the same. Here
rows have a sink, neighbours, heavy hitters and topics, and 90 % of a row's mass lies on a tenth of its keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TARGET_MASS, TARGET_KEYS = 0.9, 0.1
"""The temperature is set so that the heaviest ``TARGET_KEYS`` of a row's keys hold ``TARGET_MASS`` of it."""

AR_COEFFICIENT = 0.98
"""Of the latent that both queries and keys follow; neighbours 34 tokens apart still correlate by one half."""

TOPICS = 8
TOPIC_TOKENS = 64
"""Number of topics, and the mean length of a stretch of text on one topic."""

HEAVY_SHARE, HEAVY_WEIGHT, SINK_WEIGHT = 0.01, 3.0, 4.0
"""Share of heavy-hitter keys, and the component of such keys and of key 0 along the mean query."""

_LOCAL, _TOPIC, _NOISE, _MEAN = 1.3, 1.0, 0.5, 0.7
_SAMPLED_ROWS, _BISECTIONS = 32, 24


def structured_qkv(
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

    Queries and keys are read off one timeline of max(N, M) tokens (see :func:`positions`), whose token t is
    q, k = latent(t) + topic(t) + noise; q also has the mean-query direction, key 0 (the sink) and one key in
    a hundred (heavy hitters) a large component along it. The latent is an AR(1) process, topics last
    64 tokens on average. The query heads of a group share all but their noise. Values carry the topic, so
    that a lost key changes the output.
    """
    draw = _Draw(device, generator)
    length = max(n, m)
    latent, topics = _latent(draw, b * hkv, length, d), _topic_ids(draw, b * hkv, length)
    centroids, mean = draw.normal(b * hkv, TOPICS, d), draw.direction(b * hkv, 1, d)
    base = _LOCAL * latent + _TOPIC * _of_topic(centroids, topics)
    rows, columns = positions(n, length, device), positions(m, length, device)
    k = base[:, columns] + _NOISE * draw.normal(b * hkv, m, d)
    heavy = draw.uniform(b * hkv, m, 1) < HEAVY_SHARE
    k = k + heavy * HEAVY_WEIGHT * math.sqrt(d) * mean
    k[:, :1] = SINK_WEIGHT * math.sqrt(d) * mean
    q = base[:, rows].unflatten(0, (b, hkv)).repeat_interleave(h // hkv, 1)
    q = q + _NOISE * draw.normal(b, h, n, d)
    q = q + _MEAN * math.sqrt(d) * mean.unflatten(0, (b, hkv)).repeat_interleave(h // hkv, 1)
    k = k.unflatten(0, (b, hkv))
    values = _of_topic(draw.normal(b * hkv, TOPICS, dv), topics)[:, columns] + draw.normal(b * hkv, m, dv)
    return q * _temperature(q, k), k, (values / math.sqrt(2.0)).unflatten(0, (b, hkv))


def positions(count: int, length: int, device: torch.device) -> Tensor:
    """Tokens of a timeline of ``length`` at which ``count`` vectors are read, int64, ends included.

    All of them when count = length, the last when count = 1, evenly spread otherwise: query i never stands
    later than key i + M − N, its own under a causal mask aligned at the last token.
    """
    if count == 1:
        return torch.tensor([length - 1], device=device)
    return torch.arange(count, device=device) * (length - 1) // (count - 1)


def keys_for_mass(scores: Tensor, mass: float = TARGET_MASS) -> Tensor:
    """Share of the last axis that a softmax of ``scores`` needs to reach ``mass``, heaviest keys first."""
    held = torch.softmax(scores, -1).sort(-1, descending=True).values.cumsum(-1)
    return ((held < mass).sum(-1) + 1) / scores.shape[-1]


class _Draw:
    """Random tensors on one device from one generator."""

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self.device, self.generator = device, generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator)

    def direction(self, *shape: int) -> Tensor:
        return torch.nn.functional.normalize(self.normal(*shape), dim=-1)


def _latent(draw: _Draw, series: int, length: int, d: int) -> Tensor:
    """AR(1) process of unit variance (series, length, D), by convolution with its impulse response."""
    burn = math.ceil(math.log(1e-4) / math.log(AR_COEFFICIENT))
    total = length + burn
    noise = draw.normal(series, total, d) * math.sqrt(1.0 - AR_COEFFICIENT**2)
    response = AR_COEFFICIENT ** torch.arange(total, device=draw.device, dtype=torch.float32)
    spectrum = torch.fft.rfft(noise, 2 * total, dim=1) * torch.fft.rfft(response, 2 * total)[:, None]
    return torch.fft.irfft(spectrum, 2 * total, dim=1)[:, burn:total]


def _topic_ids(draw: _Draw, series: int, length: int) -> Tensor:
    """Topic of every token (series, length): a new one is drawn every 64 tokens on average."""
    switch = draw.uniform(series, length) < 1.0 / TOPIC_TOKENS
    stretch = switch.cumsum(1)
    drawn = (draw.uniform(series, length + 1) * TOPICS).long().clamp(max=TOPICS - 1)
    return drawn.gather(1, stretch)


def _of_topic(centroids: Tensor, topics: Tensor) -> Tensor:
    """Centroid of each token's topic: (series, TOPICS, D), (series, L) → (series, L, D)."""
    return centroids.gather(1, topics[..., None].expand(-1, -1, centroids.shape[-1]))


def _temperature(q: Tensor, k: Tensor) -> float:
    """Factor on q with which rows hold 90 % of their mass on a tenth of the keys, by bisection.

    Looks at 32 rows of up to 8 heads of the first batch element.
    """
    heads = min(8, k.shape[1])
    rows = q[0, :: q.shape[1] // k.shape[1]][
        :heads, positions(min(_SAMPLED_ROWS, q.shape[2]), q.shape[2], q.device)
    ]
    scores = rows @ k[0, :heads].transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.sort(-1, descending=True).values
    kept = max(1, round(TARGET_KEYS * scores.shape[-1]))
    low, high = -10.0, 5.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        held = torch.softmax(scores * 2.0**middle, -1)[..., :kept].sum(-1).mean().item()
        low, high = (middle, high) if held < TARGET_MASS else (low, middle)
    return 2.0**low
