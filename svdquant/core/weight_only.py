"""The op set without activation quantization: 4-bit (or 8-bit) weights, activations as they come.

For devices that have no 4-bit kernel. Rounding activations there would cost time and accuracy and win nothing: the
weight is dequantized either way and multiplied at the device's own 16-bit rate. The names and arguments are those of
`reference`; what `quantize_*` hands to `gemm_*` is the activation itself.

Products are 16-bit with the device's own (fp32) accumulation where x is 16-bit, fp32 where x is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu
from torch.nn.functional import linear as matmul

from . import reference
from .weights import LinearWeights


def _as_is(x: Tensor, down: Tensor) -> tuple[Tensor, None, Tensor]:
    return x, None, matmul(x, down.to(x.dtype))


def quantize_int4(x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, None, Tensor]:
    """x itself, and the branch's hidden values [M, R] in x's dtype."""
    return _as_is(x, down)


def quantize_int4_unsigned(
    x: Tensor, smooth: Tensor, down: Tensor, shift: float
) -> tuple[Tensor, None, Tensor]:
    """x + shift, because the stored bias is made for it; hidden values of x without the shift."""
    _, _, hidden = _as_is(x, down)
    return x + shift, None, hidden


def quantize_nvfp4(x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, None, Tensor]:
    """x itself, and the branch's hidden values [M, R] in x's dtype."""
    return _as_is(x, down)


def quantize_int8(x: Tensor, smooth: Tensor, down: Tensor, shift: float = 0.0) -> tuple[Tensor, None, Tensor]:
    """x + shift, because the stored bias is made for it; hidden values of x without the shift."""
    return quantize_int4_unsigned(x, smooth, down, shift) if shift else _as_is(x, down)


def _gemm(
    x: Tensor,
    scales: None,
    hidden: Tensor,
    weights: LinearWeights,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """x @ (codes * scales / smooth).T + hidden @ up.T + bias, in x's dtype: [M, K] -> [M, N] `dtype`.

    `smooth` divides the weight here, since x was not divided by it.
    """
    bias = None if weights.bias is None else weights.bias.to(x.dtype)
    y = matmul(x, reference.residual(weights).to(x.dtype), bias)
    y = torch.addmm(y, hidden, weights.up.to(x.dtype).T)
    return reference.finished(y, None, dtype=dtype, out=out, addend=addend)


gemm_int4 = gemm_nvfp4 = gemm_int8 = _gemm


def gemm_int4_gelu(
    x: Tensor,
    scales: None,
    hidden: Tensor,
    weights: LinearWeights,
    following: LinearWeights,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, None, Tensor]:
    """The product, GELU by tanh, and the shift of the int4 layer that follows; its hidden values without the shift."""
    y = gelu(_gemm(x, scales, hidden, weights, dtype=dtype), approximate="tanh")
    return quantize_int4_unsigned(y, following.smooth, following.down, following.spec.act_shift)


def gemm_nvfp4_gelu(
    x: Tensor,
    scales: None,
    hidden: Tensor,
    weights: LinearWeights,
    following: LinearWeights,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, None, Tensor]:
    """The product and GELU by tanh; the hidden values of the NVFP4 layer that follows."""
    y = gelu(_gemm(x, scales, hidden, weights, dtype=dtype), approximate="tanh")
    return quantize_nvfp4(y, following.smooth, following.down)


def gemv_awq(
    x: Tensor,
    weights: LinearWeights,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """W4A16 product with the bias, in x's dtype: [M, K] -> [M, N] `dtype`."""
    bias = None if weights.bias is None else weights.bias.to(x.dtype)
    y = matmul(x, reference.dequantize(weights).to(x.dtype), bias)
    return reference.finished(y, None, dtype=dtype, out=out, addend=addend)
