"""What one setting calls: tensors drawn from a seed, a function of a backend, and its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.harness.goals.settings import Setting
from attnbench.harness.work import with_backward

Forward = Callable[[str], Tensor]


@dataclass(frozen=True)
class Problem:
    """Inputs (leaves with a backward), the function of a backend, and the work of its forward."""

    setting: Setting
    inputs: tuple[Tensor, ...]
    forward: Forward
    forward_flops: int
    recomputes: bool
    upstream: Tensor

    def call(self, backend: str) -> Callable[[], Sequence[Tensor]]:
        """What is timed: the output, and with a backward the gradients of the inputs."""

        def step() -> Sequence[Tensor]:
            if not self.setting.backward:
                with torch.no_grad():
                    return (self.forward(backend),)
            output = self.forward(backend)
            return (output.detach(), *torch.autograd.grad(output, self.inputs, self.upstream))

        return step

    @property
    def flops(self) -> int:
        """Of one call."""
        return with_backward(self.forward_flops, self.recomputes, self.setting.backward)

    @property
    def moved_bytes(self) -> int:
        """Inputs and output once each, and their gradients."""
        size = sum(x.nbytes for x in self.inputs) + self.upstream.nbytes
        return size * (2 if self.setting.backward else 1)


@dataclass(frozen=True)
class Source:
    """Draws tensors of one setting: leaves, in its dtype."""

    setting: Setting
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return self.leaf(self._raw(*shape))

    def heads(self, n: int | None = None) -> Tensor:
        """(B, H, N, D), or with ``n`` tokens in place of N."""
        s = self.setting
        return self.normal(s.batch, s.heads, s.n if n is None else n, s.head_dim)

    def gate(self, *shape: int) -> Tensor:
        """Log-gates ≤ 0, most of them near 0, as trained models have them."""
        return self.leaf(F.logsigmoid(self._raw(*shape) + 3.0))

    def share(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        return self.leaf(torch.sigmoid(self._raw(*shape)))

    def unit(self) -> Tensor:
        """Vectors of length 1: the delta rule needs them."""
        s = self.setting
        return self.leaf(F.normalize(self._raw(s.batch, s.heads, s.n, s.head_dim), dim=-1))

    def leaf(self, x: Tensor) -> Tensor:
        """The tensor in the dtype of the setting, a leaf that a backward differentiates."""
        return x.to(getattr(torch, self.setting.dtype)).detach().requires_grad_(self.setting.backward)

    def problem(
        self, inputs: Sequence[Tensor], forward: Forward, flops: int, like: Tensor, recomputes: bool = True
    ) -> Problem:
        """The problem of ``forward``; ``like`` has the shape of its output."""
        upstream = self._raw(*like.shape).to(like.dtype)
        return Problem(self.setting, tuple(inputs), forward, flops, recomputes, upstream)

    def _raw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)


def attention_flops(setting: Setting, pairs: int) -> int:
    """FLOPs of scores and values for so many pairs in each head."""
    return 4 * setting.batch * setting.heads * pairs * setting.head_dim
