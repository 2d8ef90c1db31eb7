"""S4D: a diagonal linear state space per channel, applied as a long convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec

DT_MIN, DT_MAX = 1e-3, 1e-1


class S4D(Attention):
    """Convolution of every channel with the impulse response of Ns/2 complex modes, then a linear layer.

    K[l] = 2 Re Σ_n C_n (e^{ΔA_n} − 1)/A_n e^{lΔA_n}; y = K ∗ x + skip·x, under NS plus a second kernel over
    the tokens after i; output GLU(Linear(gelu(y))).
    """

    spec = Spec(
        id="s4d",
        name="S4D",
        family="linear",
        kind="mixer",
        paper=Paper(
            "On the Parameterization and Initialization of Diagonal State Space Models",
            2022,
            arxiv="2206.11893",
            venue="NeurIPS 2022",
        ),
        upstream="https://github.com/state-spaces/s4",
        patterns=(Pattern.NS, Pattern.CS),
        summary="Mixes tokens by a long convolution whose filter is the response of a diagonal state space.",
        formula="y_i = Σ_{l≥0} K[l] x_{i−l} + skip·x_i (NS: + Σ_{r≥0} K'[r] x_{i+1+r}), "
        "K[l] = 2 Re Σ_n C_n (e^{ΔA_n} − 1)/A_n e^{lΔA_n}; output GLU(Linear(gelu(y)))",
        cost="3 real FFTs of length ≥ 2N per channel, 2·C·Ns·N FLOPs per filter, 4·N·C² in the output layer; "
        "spectra of 2·2N·C·8 bytes",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        linear_in_v=False,
        hot_loop="FFT convolution (torch.fft, fp32); the filters are two real batched GEMMs",
        backends=("reference", "torch"),
        hyper=(
            Hyper("state", 64, "state size Ns, even: Ns/2 complex modes and their conjugates", cab=16),
            Hyper("channels", 1, "filters per channel, concatenated before the output layer", cab=1),
            Hyper(
                "init",
                "lin",
                "imaginary parts of A: lin, πn; inv, (Ns/π)(Ns/(2n + 1) − 1)",
                choices=("lin", "inv"),
                cab="inv",
            ),
            Hyper("output", "glu", "output layer after the GELU", choices=("glu", "linear"), cab="linear"),
            Hyper(
                "variant",
                "paper",
                "cab: one A for all channels, and C multiplied at initialisation by B, complex normal "
                "rescaled to 2 Σ|B_n/A_n|² = 1",
                choices=("paper", "cab"),
            ),
        ),
        deviations=(
            "NS is always two-sided; CAB's needs a flag for it and is causal without.",
            "The filter is evaluated as e^{aLΔA}·e^{bΔA} for l = aL + b, by two GEMMs, so that memory is "
            "O(C·Ns·√N) and not O(C·Ns·N).",
        ),
        flops_backend="",
        flops_note="FFTs count as 2.5·L·log2 L for a real transform of length L; torch's counter gives 0.",
        test_hyper={"state": 4},
    )

    def setup(self) -> None:
        """Create Δ, A, C, the skip connection and the output layer."""
        c, state, channels = self.embed_dim, self.hp.state, self.hp.channels
        if state < 2 or state % 2:
            raise UsageError(f"s4d: observed state={state}, expected an even number of at least 2")
        modes = state // 2
        copies = 1 if self.hp.variant == "cab" else c
        index = torch.arange(modes, dtype=torch.float32)
        linear = math.pi * index
        inverse = (state / math.pi) * (state / (2 * index + 1) - 1)
        frequency = linear if self.hp.init == "lin" else inverse
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        self.log_dt = nn.Parameter(torch.empty(c).uniform_(low, high))
        self.log_decay = nn.Parameter(torch.full((copies, modes), math.log(0.5)))
        self.frequency = nn.Parameter(frequency.expand(copies, modes).clone())
        self.read_out = nn.Parameter(self._initial_read_out(channels, modes))
        if self.pattern is Pattern.NS:
            self.read_out_reverse = nn.Parameter(self._initial_read_out(channels, modes))
        self.skip = nn.Parameter(torch.randn(channels, c))
        self.output = nn.Linear(channels * c, 2 * c if self.hp.output == "glu" else c, bias=self.bias)

    def _initial_read_out(self, channels: int, modes: int) -> Tensor:
        """C as pairs of real and imaginary parts, (channels, C, modes, 2)."""
        c = torch.randn(channels, self.embed_dim, modes, dtype=torch.complex64)
        if self.hp.variant == "cab":
            b = torch.randn(1, modes, dtype=torch.complex64)
            a = torch.complex(-self.log_decay.detach().exp(), self.frequency.detach())
            c = c * b / (2 * (b / a).abs().square().sum(-1, keepdim=True)).sqrt()
        return torch.view_as_real(c)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Mix x (B, N, C) along its tokens; a padded token counts as 0. Returns (B, N, C)."""
        x = self.source(x, context)
        if key_padding_mask is not None:
            x = x.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        y = self.convolve(x).to(x.dtype)
        y = self.output(F.gelu(y).flatten(-2))
        return F.glu(y, -1) if self.hp.output == "glu" else y

    def convolve(self, x: Tensor) -> Tensor:
        """The linear part: x (B, N, C) → (B, N, channels, C), in fp32 (fp64 for fp64 inputs)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        step, gains = self._modes(wide)
        mixed = _recur(x, step, gains) if self.backend == "reference" else _convolve(x, step, gains)
        return mixed + self.skip.to(wide) * x.unsqueeze(2)

    def _modes(self, wide: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """ΔA (C, modes), complex, and C (e^{ΔA} − 1)/A of the forward and, under NS, the reverse filter."""
        a = torch.complex(-self.log_decay.to(wide).exp(), self.frequency.to(wide))
        step = self.log_dt.to(wide).exp().unsqueeze(-1) * a
        hold = _expm1(step) / a
        read_outs = [self.read_out]
        if self.pattern is Pattern.NS:
            read_outs.append(self.read_out_reverse)
        return step, [torch.view_as_complex(c.to(wide).contiguous()) * hold for c in read_outs]

    def flops(self, n: int, m: int) -> int:
        """Filters by GEMM, three real FFTs per channel and filter bank, the output layer."""
        c, channels = self.embed_dim, self.hp.channels
        filters = 2 if self.pattern is Pattern.NS else 1
        length = _fft_length(n)
        ffts = c * (1 + 2 * channels) * 2.5 * length * math.log2(length)
        width = 2 * c if self.hp.output == "glu" else c
        block, rows = _blocks(n)
        responses = filters * channels * 2 * c * self.hp.state * block * rows
        return responses + round(ffts) + 2 * n * channels * c * width

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Spectra of the input and of the product, complex64 of half the FFT length each."""
        return _fft_length(n) // 2 * 8 * self.embed_dim * (1 + 2 * self.hp.channels)


def _expm1(z: Tensor) -> Tensor:
    """e^z − 1 for complex z, without cancellation near 0."""
    real = torch.expm1(z.real) * torch.cos(z.imag) - 2 * torch.sin(0.5 * z.imag).square()
    return torch.complex(real, torch.exp(z.real) * torch.sin(z.imag))


def _fft_length(n: int) -> int:
    """The power of two from 2n on: long enough that a circular convolution is a linear one."""
    return 1 << (2 * n - 1).bit_length()


def _blocks(n: int) -> tuple[int, int]:
    """Length ⌈√n⌉ and number of the blocks that n powers are computed in."""
    block = math.isqrt(n - 1) + 1
    return block, -(-n // block)


def impulse_response(step: Tensor, gain: Tensor, n: int) -> Tensor:
    """K[l] = 2 Re Σ gain·e^{l·step}, l < n: step (C, modes), gain (channels, C, modes) → (channels, C, n)."""
    block, rows = _blocks(n)
    count = torch.arange(block, dtype=step.real.dtype, device=step.device)
    fine = torch.exp(step.unsqueeze(-1) * count)
    starts = (block * count[:rows]).unsqueeze(-1)
    coarse = gain.unsqueeze(-2) * torch.exp(step.unsqueeze(-2) * starts)
    real = coarse.real @ fine.real - coarse.imag @ fine.imag
    return 2 * real.flatten(-2)[..., :n]


def _convolve(x: Tensor, step: Tensor, gains: list[Tensor]) -> Tensor:
    """Both filters as one circular convolution: lag l ≥ 0 stands at l, lag −1 − r at length − 1 − r."""
    n = x.shape[1]
    length = _fft_length(n)
    kernel = F.pad(impulse_response(step, gains[0], n), (0, length - n))
    if len(gains) == 2:
        backward = impulse_response(step, gains[1], n).flip(-1)
        kernel = kernel + F.pad(backward, (length - n, 0))
    spectrum = torch.fft.rfft(x.transpose(1, 2), length).unsqueeze(1) * torch.fft.rfft(kernel, length)
    return torch.fft.irfft(spectrum, length)[..., :n].permute(0, 3, 1, 2)


def _recur(x: Tensor, step: Tensor, gains: list[Tensor]) -> Tensor:
    """The definition: h_t = e^{ΔA} h_(t−1) + x_t, read by the gain; backwards, read before x_t is added."""
    decay = torch.exp(step)
    zero = torch.zeros(x.shape[0], *step.shape, dtype=step.dtype, device=x.device)
    outputs: list[Tensor] = []
    h = zero
    for x_t in x.unbind(1):
        h = decay * h + x_t.unsqueeze(-1)
        outputs.append(_read(h, gains[0]))
    if len(gains) == 2:
        h = zero
        for t in reversed(range(x.shape[1])):
            outputs[t] = outputs[t] + _read(h, gains[1])
            h = decay * h + x[:, t].unsqueeze(-1)
    return torch.stack(outputs, 1)


def _read(h: Tensor, gain: Tensor) -> Tensor:
    """2 Re Σ_n gain·h: state (B, C, modes) → (B, channels, C)."""
    return 2 * (gain * h.unsqueeze(1)).sum(-1).real
