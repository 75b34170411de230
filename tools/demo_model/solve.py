"""A small SVDQuant: choose a smoothing, take out a low-rank part, round the rest to four bits.

For one linear with calibration inputs x (arXiv 2411.05007, section 4):

    s          the candidate whose 4-bit output is nearest to the 16-bit one
    W * s  =   up @ factor + residual          the SVD keeps the strongest `rank` directions in 16 bits
    residual ~ codes * scales                  groups of 64, absmax / 7
    down   =   factor / s                      so that the branch reads raw inputs

Linears that read the same input share s, so that a kernel can quantize that input once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...svdquant.core import int4, lowrank, reference, smooth
from ...svdquant.core.linear import linear
from ...svdquant.core.weights import INT4, INT4_UNSIGNED, LinearWeights

T = torch.bfloat16
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def candidates(x_max: Tensor, w_max: Tensor) -> Iterator[Tensor]:
    """Smoothing vectors [K] to try: none, from activations alone, and from activations and weights."""
    yield torch.ones_like(x_max)
    for alpha in ALPHAS:
        yield smooth.smoothing_vector(x_max, torch.ones_like(w_max), alpha)
        yield smooth.smoothing_vector(x_max, w_max, alpha)


def quantize(w: Tensor, bias: Tensor, s: Tensor, *, rank: int, unsigned: bool) -> LinearWeights:
    """One linear with a given smoothing.

    w       [N, K]   fp32
    bias    [N]      fp32
    s       [K]      fp32   rounded to bf16 before use

    The residual is taken against the rounded branch, so that the 4-bit part absorbs that rounding too. For
    unsigned codes the bias takes back what the constant shift adds through the rounded weight.
    """
    s = s.to(T)
    factor, up, _ = lowrank.split(smooth.smooth_weight(w, s), rank)
    down, up = lowrank.unsmooth(factor, s, T), up.to(T)
    codes, scales = int4.quantize_weight(smooth.smooth_weight(w - up.float() @ down.float(), s), T)
    spec = INT4_UNSIGNED if unsigned else INT4
    made = LinearWeights(spec, codes, scales, smooth=s, down=down, up=up, bias=bias.to(T))
    return replace(made, bias=(bias - reference.shift_compensation(made)).to(T))


def output_error(x: Tensor, w: Tensor, bias: Tensor, made: LinearWeights) -> float:
    """Squared distance of a quantized linear's outputs from the exact ones, for inputs [M, K]."""
    return (linear(x, made, reference) - (x @ w.T + bias)).square().sum().item()


def search(
    linears: list[tuple[Tensor, Tensor]], x: Tensor, *, rank: int, unsigned: bool
) -> list[LinearWeights]:
    """Quantize linears (weight, bias) that read the same input with the best common smoothing.

    x   [M, K]   fp32   calibration inputs
    """
    x_max = (x + INT4_UNSIGNED.act_shift * unsigned).abs().amax(0)
    w_max = torch.cat([w for w, _ in linears]).abs().amax(0)
    best, best_error = [], float("inf")
    for s in candidates(x_max, w_max):
        tried = [quantize(w, bias, s, rank=rank, unsigned=unsigned) for w, bias in linears]
        error = sum(output_error(x, w, bias, made) for (w, bias), made in zip(linears, tried, strict=True))
        if error < best_error:
            best, best_error = tried, error
    return best
