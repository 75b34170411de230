"""What is to be quantized (`Task`), and how far it has come (`Fit`): every step takes a Fit and returns a new one.

Inside, everything speaks of p, the input as the 4-bit product sees it before smoothing:

    p = x + shift     after a GELU, int4: codes are unsigned
    p = x - center    where a bias before this linear can take the mean out of its input for good
    y = W x + b  ~  Q(p / s) values^T  +  (x - center) down^T up^T  +  stored bias

`values` is the residual W s - up (down s) on the 4-bit grid. What shift and center cost is settled once, in the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import reference
from ..core.groups import expand
from ..core.weights import LinearWeights, QuantSpec
from .rounding import Grid, pack_codes

T = torch.bfloat16


@dataclass(frozen=True, eq=False)
class Sample:
    """What is known of a linear's inputs, from calibration.

    rows   [T, K]   any float   tokens that steps may look at
    held   [H, K]   any float   tokens that none may: errors are reported on them
    mean   [K]      fp32        over every token that was seen
    low    [K]      fp32        smallest and
    high   [K]      fp32        largest value of each channel, over the same
    """

    rows: Tensor
    held: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, rows: Tensor, held: Tensor) -> Sample:
        """A sample that saw nothing but `rows`."""
        seen = rows.float()
        return cls(rows, held, seen.mean(0), seen.amin(0), seen.amax(0))

    def columns(self, part: slice) -> Sample:
        """The sample of a linear that reads some of the columns."""
        return Sample(
            self.rows[:, part], self.held[:, part], self.mean[part], self.low[part], self.high[part]
        )

    def to(self, device: torch.device) -> Sample:
        """The same on another device."""
        return Sample(*(getattr(self, name).to(device) for name in ("rows", "held", "mean", "low", "high")))


@dataclass(frozen=True, eq=False)
class Task:
    """One linear to quantize.

    weight  [N, K]   fp32
    bias    [N]      fp32 or None
    spec    int4 or nvfp4; act_shift > 0 for unsigned activations
    rank    of the branch, 0 for none
    sample  inputs, None where nothing is known of them
    center  [K]      fp32 or None   what is taken out of the input before it arrives
    seed    of everything random
    """

    weight: Tensor
    bias: Tensor | None
    spec: QuantSpec
    rank: int
    sample: Sample | None = None
    center: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        n, k = self.weight.shape
        if k % self.spec.group:
            raise ValueError(
                f"weight: expected K in multiples of {self.spec.group}, got {k}. Keep it in 16 bits."
            )
        if not 0 <= self.rank <= min(n, k):
            raise ValueError(f"rank: expected 0..{min(n, k)} for a [{n}, {k}] weight, got {self.rank}.")
        if not bool(torch.isfinite(self.weight).all()):
            raise ValueError(
                "weight: expected finite numbers, got NaN or infinity. The source file is damaged."
            )
        if self.sample is not None and self.sample.rows.shape[1] != k:
            raise ValueError(f"sample: expected inputs of {k} channels, got {self.sample.rows.shape[1]}.")

    @property
    def offset(self) -> Tensor:
        """p - x, [K] fp32."""
        if self.center is not None:
            return -self.center
        return torch.full_like(self.weight[0], self.spec.act_shift)

    def inputs(self, rows: Tensor) -> Tensor:
        """p of raw inputs: [M, K] -> [M, K] in the dtype that the model runs in."""
        return (rows.float() + self.offset).to(T)

    def generator(self) -> torch.Generator:
        """A fresh source of the task's random numbers."""
        return torch.Generator(self.weight.device).manual_seed(self.seed)


@dataclass(frozen=True, eq=False)
class Fit:
    """A task and the numbers found for it so far.

    smooth  [K]      fp32   representable in bf16, as are down and up
    down    [R, K]   fp32   acts on unsmoothed inputs
    up      [N, R]   fp32
    grid    scales of the residual, None before it was rounded
    values  [N, K]   fp32   the residual on the grid, None before
    bias    [N]      fp32   correction of the mean output error
    """

    task: Task
    smooth: Tensor
    down: Tensor
    up: Tensor
    grid: Grid | None = None
    values: Tensor | None = None
    bias: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The smoothed weight W s."""
        return self.task.weight * self.smooth

    @property
    def factor(self) -> Tensor:
        """The branch's first factor on smoothed inputs, [R, K]."""
        return self.down * self.smooth

    @property
    def residual(self) -> Tensor:
        """What four bits have to carry: W s - up factor."""
        return self.weight - self.up @ self.factor

    def with_branch(self, factor: Tensor, up: Tensor) -> Fit:
        """Take a branch on smoothed inputs, rounded as files keep it."""
        return replace(self, down=rounded(factor / self.smooth), up=rounded(up))

    def with_smooth(self, smooth: Tensor) -> Fit:
        """Take a smoothing vector; what was fitted to the old one is dropped."""
        return replace(start(self.task), smooth=smooth)


def rounded(x: Tensor) -> Tensor:
    """x as bf16 holds it, in fp32."""
    return x.to(T).float()


def start(task: Task) -> Fit:
    """No smoothing, no branch, nothing rounded."""
    w = task.weight
    return Fit(task, torch.ones_like(w[0]), w.new_zeros(0, w.shape[1]), w.new_zeros(w.shape[0], 0))


def round_inputs(p: Tensor, smooth: Tensor, spec: QuantSpec) -> Tensor:
    """Inputs as the 4-bit product sees them, codes times scales: p [M, K] -> [M, K] fp32, on smoothed channels."""
    none = p.new_zeros(0, p.shape[1])
    if spec.format == "nvfp4":
        codes, scales, _ = reference.quantize_nvfp4(p, smooth, none)
        return reference.fp4.decode(codes) * expand(scales.float(), spec.group)
    if spec.act_shift:
        codes, scales, _ = reference.quantize_int4_unsigned(p, smooth, none, 0.0)  # p is shifted already
    else:
        codes, scales, _ = reference.quantize_int4(p, smooth, none)
    return codes.float() * expand(scales.float(), spec.group)


def outputs(fit: Fit, rows: Tensor) -> Tensor:
    """What the quantized linear makes of raw inputs, less its bias and plus the offset's share: [M, K] -> [M, N]."""
    p = fit.task.inputs(rows)
    y = round_inputs(p, fit.smooth, fit.task.spec) @ fit.values.T
    y = y + (p.float() @ fit.down.T) @ fit.up.T
    return y if fit.bias is None else y + fit.bias


def squared_error(fit: Fit, rows: Tensor) -> float:
    """Sum of squared output errors on raw inputs [M, K]."""
    exact = fit.task.inputs(rows).float() @ fit.task.weight.T
    return (outputs(fit, rows) - exact).square().sum().item()


def relative_error(fit: Fit) -> float:
    """||y - W x|| / ||W x|| on the held-out rows; of the weight itself where there are none."""
    task = fit.task
    if task.sample is None:
        left = (fit.residual - fit.values) / fit.smooth
        return (left.norm() / task.weight.norm().clamp(min=1e-30)).item()
    exact = task.sample.held.float() @ task.weight.T
    return (squared_error(fit, task.sample.held) ** 0.5) / max(exact.norm().item(), 1e-30)


def stored_bias(fit: Fit) -> Tensor:
    """The bias that goes with the codes: what shift and center add is taken out, [N] fp32."""
    task = fit.task
    bias = torch.zeros_like(fit.values[:, 0]) if task.bias is None else task.bias
    bias = bias - task.weight @ task.offset
    if task.spec.act_shift:
        bias = bias + fit.up @ (fit.down.sum(-1) * task.spec.act_shift)
    return bias if fit.bias is None else bias + fit.bias


def freeze(fit: Fit) -> LinearWeights:
    """The fit as a file keeps it."""
    needs_bias = fit.task.bias is not None or fit.bias is not None or bool(fit.task.offset.any())
    return LinearWeights(
        fit.task.spec,
        pack_codes(fit.values, fit.grid),
        fit.grid.scales,
        second_scale=fit.grid.second,
        smooth=fit.smooth.to(T),
        down=fit.down.to(T).contiguous(),
        up=fit.up.to(T).contiguous(),
        bias=stored_bias(fit).to(T) if needs_bias else None,
    )
