"""The op set in readable torch: what every kernel means, and what runs where no kernel is built.

Quantizers turn activations into codes and scales and compute the branch's hidden values in the same pass, because a
kernel reads x once. GEMMs take those and return the finished output. Everything accumulates in fp32.

Every product takes two tensors more, for layers made of parts. `out` [M, N] of `dtype` is written into and returned
instead of a new one; its rows may lie apart. `addend` [M, N] fp32 is added last, before the one rounding.

Group products are integers below 2^13 (int4) or multiples of 1/4 (e2m1): scaling both operands first and multiplying
once is the same sum, exact in fp32 up to the rounding of the accumulation. An int8 row's sum is an exact integer. Only
a finished output is rounded, to the dtype that was asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu
from torch.nn.functional import linear as matmul

from . import awq, fp4, int4, int8
from .groups import INT4_GROUP, NVFP4_GROUP, act_scale, expand, group
from .smooth import smooth_act
from .weights import LinearWeights

AWQ_ROWS = 256  # of a weight, dequantized and multiplied before the next ones are
FP16_MAX = 65504.0


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A finished fp32 output in the dtype wanted.

    fp16 saturates, as in the published kernels: one infinity would blacken the whole image.
    """
    return (y.clamp(-FP16_MAX, FP16_MAX) if dtype == torch.float16 else y).to(dtype)


def finished(
    y: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """What ends every product: bias and addend join its sums, which are rounded once, into `out` if there is one."""
    y = y if bias is None else y + bias.float()
    y = rounded(y if addend is None else y + addend, dtype)
    return y if out is None else out.copy_(y)


def hidden(x: Tensor, down: Tensor) -> Tensor:
    """The branch's hidden values, summed in fp32: [M, K] x [R, K] -> [M, R] fp32."""
    return matmul(x.float(), down.float())


def _codes(xs: Tensor, alpha: Tensor, size: int) -> Tensor:
    """xs / alpha by groups, in fp32, 0 where a group is all zero: [M, K], [M, G] -> [M, G, size]."""
    divisor = torch.where(alpha == 0, torch.ones_like(alpha), alpha).unsqueeze(-1)
    return group(xs.float(), size) / divisor


def quantize_int4(x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed int4 activations, one scale per token and 64 columns.

    x        [M, K]      fp32 | bf16 | fp16
    smooth   [K]         any float     divides x
    down     [R, K]      any float     sees raw x
    returns
      codes  [M, K]      int8          -7..7
      scales [M, K/64]   as x          absmax / 7, rounded; the codes used the unrounded one
      hidden [M, R]      fp32
    """
    xs = smooth_act(x, smooth)
    alpha = act_scale(xs, INT4_GROUP, int4.EMITTED_MAX)
    codes = torch.round(_codes(xs, alpha, INT4_GROUP)).clamp(int4.STORED_MIN, int4.STORED_MAX)
    return codes.flatten(-2).to(torch.int8), alpha.to(x.dtype), hidden(x, down)


def quantize_int4_unsigned(
    x: Tensor, smooth: Tensor, down: Tensor, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned int4 activations of x + shift, for what follows a GELU.

    x        [M, K]      fp32 | bf16 | fp16   above -shift
    smooth   [K]         any float            divides x + shift
    down     [R, K]      any float            sees raw x, without the shift
    returns
      codes  [M, K]      uint8                0..15
      scales [M, K/64]   as x                 max / 15
      hidden [M, R]      fp32
    """
    xs = smooth_act((x.float() + shift).to(x.dtype), smooth)
    alpha = act_scale(xs, INT4_GROUP, int4.UNSIGNED_MAX)
    codes = torch.round(_codes(xs, alpha, INT4_GROUP)).clamp(0, int4.UNSIGNED_MAX)
    return codes.flatten(-2).to(torch.uint8), alpha.to(x.dtype), hidden(x, down)


def quantize_nvfp4(x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e2m1 activations, one e4m3 scale per token and 16 columns, no second scale.

    x        [M, K]      fp32 | bf16 | fp16
    smooth   [K]         any float
    down     [R, K]      any float
    returns
      codes  [M, K]      uint8   e2m1, ties to even
      scales [M, K/16]   e4m3    absmax / 6; saturates at 448, 0 below 2^-10
      hidden [M, R]      fp32
    """
    xs = smooth_act(x, smooth)
    alpha = act_scale(xs, NVFP4_GROUP, 6).clamp(max=fp4.E4M3_MAX)
    reciprocal = torch.where(alpha == 0, torch.zeros_like(alpha), 1 / alpha).unsqueeze(-1)
    codes = fp4.encode_act((group(xs.float(), NVFP4_GROUP) * reciprocal).flatten(-2))
    return codes, fp4.to_e4m3(alpha), hidden(x, down)


def quantize_int8(
    x: Tensor, smooth: Tensor, down: Tensor, shift: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 activations of x + shift, one scale a token.

    x        [M, K]   fp32 | bf16 | fp16
    smooth   [K]      any float     divides x + shift
    down     [R, K]   any float     sees raw x, without the shift
    returns
      codes  [M, K]   int8          -127..127
      scales [M, 1]   fp32          absmax / 127
      hidden [M, R]   fp32
    """
    xs = smooth_act((x.float() + shift).to(x.dtype) if shift else x, smooth)
    alpha = act_scale(xs, x.shape[1], int8.CODE_MAX)
    codes = torch.round(_codes(xs, alpha, x.shape[1])).clamp(-int8.CODE_MAX, int8.CODE_MAX)
    return codes.flatten(-2).to(torch.int8), alpha, hidden(x, down)


def gemm_int4(
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weights: LinearWeights,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """W4A4 GEMM with the branch and bias: signed or unsigned codes, int4 weights.

    codes    [M, K]      int8 | uint8, or any dtype that holds these integers
    scales   [M, K/64]   any float
    hidden   [M, R]      fp32
    returns  [M, N]      `dtype`
    """
    x = codes.float() * expand(scales.float(), INT4_GROUP)
    y = matmul(x, int4.dequantize_weight(weights.codes, weights.scales))
    y += matmul(hidden, weights.up.float())
    return finished(y, weights.bias, dtype=dtype, out=out, addend=addend)


def gemm_int4_gelu(
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weights: LinearWeights,
    following: LinearWeights,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """W4A4 GEMM, GELU by tanh, and the activations of the int4 layer that follows: gemm_int4 to quantize_int4.

    codes      [M, K]      int8 | uint8
    scales     [M, K/64]   any float
    hidden     [M, R]      fp32
    following              int4; its K is the N of `weights`
    dtype                  of the activations between, which are rounded before the GELU and after it
    returns
      codes    [M, N]      uint8   int8 where `following` has no act_shift
      scales   [M, N/64]   `dtype`
      hidden   [M, R']     fp32
    """
    x = gelu(gemm_int4(codes, scales, hidden, weights, dtype=dtype), approximate="tanh")
    if following.spec.act_shift:
        return quantize_int4_unsigned(x, following.smooth, following.down, following.spec.act_shift)
    return quantize_int4(x, following.smooth, following.down)


def gemm_nvfp4(
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weights: LinearWeights,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """NVFP4 GEMM with the branch and bias: codes [M, K] uint8, scales [M, K/16] e4m3 -> [M, N] `dtype`."""
    x = fp4.decode(codes) * expand(scales.float(), NVFP4_GROUP)
    y = matmul(x, fp4.dequantize_weight(weights.codes, weights.scales, weights.second_scale))
    y += matmul(hidden, weights.up.float())
    return finished(y, weights.bias, dtype=dtype, out=out, addend=addend)


def gemm_nvfp4_gelu(
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weights: LinearWeights,
    following: LinearWeights,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4 GEMM, GELU by tanh, and the activations of the NVFP4 layer that follows: gemm_nvfp4 to quantize_nvfp4.

    codes      [M, K]      uint8   e2m1
    scales     [M, K/16]   e4m3
    hidden     [M, R]      fp32
    following              nvfp4; its K is the N of `weights`. Its second scale belongs to its weight alone.
    dtype                  of the activations between, which are rounded before the GELU and after it
    returns
      codes    [M, N]      uint8   e2m1
      scales   [M, N/16]   e4m3
      hidden   [M, R']     fp32
    """
    x = gelu(gemm_nvfp4(codes, scales, hidden, weights, dtype=dtype), approximate="tanh")
    return quantize_nvfp4(x, following.smooth, following.down)


def gemm_int8(
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weights: LinearWeights,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """W8A8 GEMM with the branch and bias: codes [M, K] int8, scales [M, 1] fp32 -> [M, N] `dtype`."""
    y = int8.integer_matmul(codes, weights.codes).float() * weights.scales.T * scales
    y += matmul(hidden, weights.up.float())
    return finished(y, weights.bias, dtype=dtype, out=out, addend=addend)


def gemv_awq(
    x: Tensor,
    weights: LinearWeights,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """W4A16 product with the bias: x [M, K] -> [M, N] `dtype`. As many weight rows at a time as a cache holds."""
    parts = zip(*(t.split(AWQ_ROWS) for t in (weights.codes, weights.scales, weights.zeros)), strict=True)
    y = torch.cat([matmul(x.float(), awq.dequantize_weight(*part)) for part in parts], dim=-1)
    return finished(y, weights.bias, dtype=dtype, out=out, addend=addend)


def dequantize(weights: LinearWeights) -> Tensor:
    """The weight a quantized linear stands for: codes * scales / smooth + up @ down.

    returns  [N, K]   fp32
    """
    if weights.spec.format == "awq":
        return awq.dequantize_weight(weights.codes, weights.scales, weights.zeros)
    return residual(weights) + weights.up.float() @ weights.down.float()


def residual(weights: LinearWeights) -> Tensor:
    """The quantized part of an SVDQuant weight, on raw activations: codes * scales / smooth, [N, K] fp32."""
    if weights.spec.format == "int4":
        w = int4.dequantize_weight(weights.codes, weights.scales)
    elif weights.spec.format == "int8":
        w = int8.dequantize_weight(weights.codes, weights.scales)
    else:
        w = fp4.dequantize_weight(weights.codes, weights.scales, weights.second_scale)
    return w / weights.smooth.float()


def shift_compensation(weights: LinearWeights) -> Tensor:
    """What the bias of a layer with shifted activations takes out: residual @ shift, [N] fp32; else zeros.

    The bias that goes with `dequantize` is the stored one with this added.
    """
    if not weights.spec.act_shift:
        return torch.zeros(weights.out_features, device=weights.codes.device)
    return residual(weights).sum(-1) * weights.spec.act_shift
