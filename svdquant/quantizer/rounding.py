"""Group scales and values of a weight on a 4-bit grid.

The published packers take absmax / 7 (int4) or absmax / 6 (NVFP4). A scale that clips the largest value, or for
NVFP4 one that moves the others onto better steps, often leaves less error: `scales_mse` tries a few per group.

int4 has one code more below zero than above. `-7/8` and its like put the largest value of a group on -8, with a
negative scale where that value is positive; decoders multiply and do not care.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import fp4, int4
from ..core.groups import expand, group
from ..core.weights import QuantSpec

T = torch.bfloat16
INT4_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, -7 / 8, -0.82, -0.78)
NVFP4_FACTORS = (1.0, 0.95, 0.9, 0.8, 2 / 3, 1.05, 1.1, 1.2, 1.3, 1.5)
CACHED = 2**17  # numbers that a CPU core's cache holds together with what is made of them


@dataclass(frozen=True, eq=False)
class Grid:
    """The scales of a weight as files keep them.

    scales  [N, K/group]   bf16 | e4m3
    second  [1] bf16 for nvfp4, else None
    """

    spec: QuantSpec
    scales: Tensor
    second: Tensor | None = None

    def steps(self) -> Tensor:
        """The value of code 1 in every place, [N, K] fp32, 1 where a group is empty."""
        scales = self.scales.float() if self.second is None else self.scales.float() * self.second.float()
        return expand(torch.where(scales == 0, torch.ones_like(scales), scales), self.spec.group)


def snap(x: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest value of the unit grid: -8..7, or e2m1."""
    if spec.format == "int4":
        return x.round().clamp(int4.STORED_MIN, int4.STORED_MAX)
    size = x.abs().clamp(max=fp4.E2M1_MAX)
    step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
    return (size / step).round() * step * x.sign()


def nearest(w: Tensor, grid: Grid) -> Tensor:
    """w rounded to the grid, [N, K] fp32."""
    steps = grid.steps()
    return snap(w / steps, grid.spec) * steps


def pack_codes(values: Tensor, grid: Grid) -> Tensor:
    """Packed codes of values on the grid: [N, K] -> [N, K/2] uint8."""
    units = values / grid.steps()
    if grid.spec.format == "int4":
        return int4.pack_nibbles(units.round().to(torch.int8))
    return int4.pack_nibbles(fp4.encode_weight(units))


def scales_absmax(w: Tensor, spec: QuantSpec) -> Grid:
    """The scale that puts the largest value of a group on the largest code."""
    second = _second(w, spec)
    return next(_candidates(w, spec, second, (1.0,)))


def scales_mse(w: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Grid:
    """Of a few scales the one with the smallest squared rounding error, group by group.

    importance  [K]   weighs the columns, e.g. mean square of the inputs; None: all alike
    """
    second = _second(w, spec)
    rows = len(w) if w.is_cuda else max(CACHED // w.shape[1], 1)
    scales = torch.cat([_best_scales(part, spec, second, importance) for part in w.split(rows)])
    return Grid(spec, scales.to(torch.float8_e4m3fn if spec.format == "nvfp4" else T), second)


def _best_scales(w: Tensor, spec: QuantSpec, second: Tensor | None, importance: Tensor | None) -> Tensor:
    """The chosen scales of some rows, [n, K/group] fp32."""
    factors = INT4_FACTORS if spec.format == "int4" else NVFP4_FACTORS
    weigh = 1.0 if importance is None else importance
    least = scales = None
    for tried in _candidates(w, spec, second, factors):
        error = group((nearest(w, tried) - w).square() * weigh, spec.group).sum(-1)
        if least is None:
            least, scales = error, tried.scales.float()
        else:
            better = error < least
            least, scales = (
                torch.where(better, error, least),
                torch.where(better, tried.scales.float(), scales),
            )
    return scales


def _second(w: Tensor, spec: QuantSpec) -> Tensor | None:
    """The scale above NVFP4's group scales, with room for the largest factor."""
    if spec.format != "nvfp4":
        return None
    top = w.abs().max() * max(NVFP4_FACTORS) / (fp4.E2M1_MAX * fp4.E4M3_MAX)
    return top.clamp(min=1e-30).to(T).reshape(1)


def _candidates(
    w: Tensor, spec: QuantSpec, second: Tensor | None, factors: tuple[float, ...]
) -> Iterator[Grid]:
    grouped = group(w, spec.group)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    for factor in factors:
        if spec.format == "nvfp4":
            yield Grid(spec, fp4.to_e4m3(largest.abs() * factor / fp4.E2M1_MAX / second.float()), second)
        else:
            scale = (largest.abs() if factor > 0 else largest) * factor / int4.EMITTED_MAX
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            yield Grid(spec, scale.to(T))
