"""NVFP4 by torch's own product of block-scaled 4-bit floats, which cuBLAS computes on Blackwell: no library of ours.

`torch._scaled_mm` multiplies e2m1 codes and the e4m3 scales of 16 columns each; the second scale, branch and bias
follow in fp32, in passes of their own over the output. Names and signatures are those of core.reference. Functions of
their own make what torch wants of its operands: K filled up to 32 columns, N to 16 rows, scales in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import int4, reference
from ..core.weights import LinearWeights

COLUMNS, ROWS = 32, 16  # what K and N must be multiples of

quantize_nvfp4 = reference.quantize_nvfp4


def exists() -> bool:
    """Whether this torch has the product. Whether a card computes it rightly, the self-test finds out."""
    cuda = [int(number) for number in (torch.version.cuda or "0").split(".")]
    return cuda >= [12, 8] and hasattr(torch, "float4_e2m1fn_x2") and hasattr(torch, "_scaled_mm")


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
    """NVFP4 GEMM with branch and bias; see core.reference.gemm_nvfp4. The output is rounded once."""
    y = multiply((int4.pack_nibbles(codes), scales), unsigned(weights.codes, weights.scales))
    second, bias = weights.second_scale.float(), weights.bias
    y = y * second if bias is None else torch.addcmul(bias.float(), y, second)
    y = torch.addmm(y, hidden, weights.up.float().T)
    return reference.finished(y, None, dtype=dtype, out=out, addend=addend)


def multiply(acts: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
    """The product of two operands, each of packed codes and of scales that are not negative.

    acts     [M, K/2] uint8, [M, K/16] e4m3
    weight   [N, K/2] uint8, [N, K/16] e4m3
    returns  [M, N]   fp32
    """
    m, n = acts[0].shape[0], weight[0].shape[0]
    if m == 0 or n == 0:
        return acts[0].new_zeros(m, n, dtype=torch.float32)
    by_rows, by_columns = operand(acts[0]), operand(weight[0], rows=ROWS).T
    scales = dict(scale_a=tiled(acts[1]), scale_b=tiled(weight[1]))
    return torch._scaled_mm(by_rows, by_columns, **scales, out_dtype=torch.float32)[:, :n]


def operand(packed: Tensor, *, rows: int = 1) -> Tensor:
    """Packed codes as torch's pairs of e2m1, with zeros up to whole multiples of 32 columns and of `rows`."""
    whole = pad(packed, (0, -packed.shape[1] % (COLUMNS // 2), 0, -packed.shape[0] % rows))
    return whole.contiguous().view(torch.float4_e2m1fn_x2)


def tiled(scales: Tensor) -> Tensor:
    """Scales in the order of tensor cores: in a tile of 128 rows by 4 groups, row 32 j + i, group g at 16 i + 4 j + g.

    scales   [rows, groups]   e4m3
    returns  [tiles * 512]    e4m3; a row of tiles after the other, with zeros up to whole tiles
    """
    rows, groups = scales.shape
    whole = pad(scales.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
    tiles = whole.view(whole.shape[0] // 128, 4, 32, -1, 4)  # rows of tiles, j, i, columns of tiles, g
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)


def unsigned(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same weight with the signs of its scales in its codes: the instruction's scales have none."""
    bits = scales.view(torch.uint8)
    flips = (bits >> 7) * 0x88  # the signs of both codes of a byte
    return packed ^ flips.repeat_interleave(8, dim=1), (bits & 0x7F).view(scales.dtype)
