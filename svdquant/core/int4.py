"""INT4: codes, nibbles, and the two ranges.

A stored nibble can hold -8..7; a decoder must take all of it. The quantizers here emit -7..7 (symmetric) for weights
and signed activations, and 0..15 for activations known to be non-negative after a shift. Recipes that search scales
(quantizer/rounding.py) may put a group's extreme on -8, under a negative scale.

Nibbles are kept two a byte, even column in the low half: [N, K] codes <-> [N, K/2] uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import INT4_GROUP, expand, group, weight_scale

STORED_MIN, STORED_MAX = -8, 7
EMITTED_MAX = 7
UNSIGNED_MAX = 15


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, even column in the low half.

    codes    [..., K]    any integer dtype   low four bits are kept
    returns  [..., K/2]  uint8
    """
    bits = codes.to(torch.uint8) & 0xF
    return bits[..., 0::2] | (bits[..., 1::2] << 4)


def unpack_unsigned(packed: Tensor) -> Tensor:
    """Nibbles as 0..15: [..., K/2] uint8 -> [..., K] uint8."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def unpack_signed(packed: Tensor) -> Tensor:
    """Nibbles as two's complement -8..7: [..., K/2] uint8 -> [..., K] int8."""
    nibbles = unpack_unsigned(packed).to(torch.int8)
    return (nibbles ^ 8) - 8


def quantize_weight(w: Tensor, dtype: torch.dtype, size: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """Round a (smoothed, residual) weight to symmetric int4.

    w        [N, K]        fp32 | fp64
    returns
      codes  [N, K/2]      uint8   packed, values -7..7, round half to even of w / stored scale
      scales [N, K/size]   dtype   absmax / 7
    """
    scales = weight_scale(w, size, EMITTED_MAX, dtype)
    codes = torch.round(group(w.float(), size) / scales.float().unsqueeze(-1))
    return pack_nibbles(codes.clamp(STORED_MIN, STORED_MAX).to(torch.int8).flatten(-2)), scales


def dequantize_weight(packed: Tensor, scales: Tensor) -> Tensor:
    """codes * scales in fp32: [N, K/2] uint8, [N, G] -> [N, K] fp32."""
    codes = unpack_signed(packed).float()
    return codes * expand(scales.float(), codes.shape[-1] // scales.shape[-1])
