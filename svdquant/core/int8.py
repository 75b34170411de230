"""INT8: a 4-bit layer as 8-bit tensor cores take it, one scale a row and one a token.

Scales that change every 64 columns cost an 8-bit product more than the product itself: each group's sum has to be made
a float and scaled before the next is added. One scale for the whole row leaves nothing inside the sum. Rounding a
4-bit weight to it adds 1 to 2 % to the 11 to 15 % that 4 bits have cost already, and activations of 8 bits give back
far more than that. This is a form for computing, not for files.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from . import fp4, int4
from .weights import LinearWeights, QuantSpec

CODE_MAX = 127
EXACT_COLUMNS = 1024  # 1024 * 127 * 127 < 2**24: the sum of so many products is an integer that fp32 holds


def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round a (smoothed, residual) weight to int8, the same on every device.

    w        [N, K]   fp32
    returns
      codes  [N, K]   int8   -127..127, round half to even of w / scale
      scales [N, 1]   fp32   absmax * fp32(1/127), 1 where a row is all zero
    """
    scales = w.abs().amax(-1, keepdim=True) * (1 / CODE_MAX)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return torch.round(w / scales).clamp(-CODE_MAX, CODE_MAX).to(torch.int8), scales


def dequantize_weight(codes: Tensor, scales: Tensor) -> Tensor:
    """codes * scales in fp32: [N, K] int8, [N, 1] -> [N, K] fp32."""
    return codes.float() * scales


def requantize(weights: LinearWeights) -> LinearWeights:
    """The same layer in int8; smooth, branch, bias and shift stay as they are.

    weights  int4 or nvfp4, whose residual is codes * scales (* second scale) on smoothed activations

    Raises ValueError for other formats.
    """
    spec = weights.spec
    if spec.format == "int4":
        residual = int4.dequantize_weight(weights.codes, weights.scales)
    elif spec.format == "nvfp4":
        residual = fp4.dequantize_weight(weights.codes, weights.scales, weights.second_scale)
    else:
        raise ValueError(f"requantize: expected int4 or nvfp4 weights, got {spec.format}.")
    codes, scales = quantize_weight(residual)
    kept = {name: getattr(weights, name) for name in ("smooth", "down", "up", "bias")}
    return LinearWeights(QuantSpec("int8", None, spec.act_shift), codes, scales, **kept)


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of int8 codes, exact: [M, K] x [N, K] -> [M, N] int32.

    By fp32 products of EXACT_COLUMNS, which are exact in any order; the whole sum, up to 2^31, would not be.
    """
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for columns in range(0, a.shape[1], EXACT_COLUMNS):
        part = slice(columns, columns + EXACT_COLUMNS)
        total += matmul(a[:, part].float(), b[:, part].float()).to(torch.int32)
    return total
