"""AWQ W4A16: unsigned codes, a scale and an added zero per row and group; activations stay 16-bit.

W = code * scale + zero. The zero is added and is negative: -(zero point) * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import group, weight_scale
from .int4 import EMITTED_MAX, pack_nibbles, unpack_unsigned

AWQ_GROUP = 64
CODE_MAX = 15
ZERO_CODE = 7  # symmetric layers store code = value + 7, so that 0..14 is used


def quantize_weight(w: Tensor, dtype: torch.dtype, size: int = AWQ_GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Round a modulation weight symmetrically, as published checkpoints do.

    w        [N, K]        fp32
    returns
      codes  [N, K/2]      uint8   packed, value + 7
      scales [N, K/size]   dtype   absmax / 7
      zeros  [N, K/size]   dtype   round(-7 * scale)
    """
    scales = weight_scale(w, size, EMITTED_MAX, dtype)
    values = torch.round(group(w.float(), size) / scales.float().unsqueeze(-1)).clamp(
        -EMITTED_MAX, EMITTED_MAX
    )
    return pack_nibbles((values + ZERO_CODE).to(torch.uint8).flatten(-2)), scales, zeros_of(scales)


def zeros_of(scales: Tensor) -> Tensor:
    """The zero that goes with a symmetric scale: round_T(-7 * scale), same shape and dtype."""
    return (-ZERO_CODE * scales.float()).to(scales.dtype)


def dequantize_weight(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """code * scale + zero in fp32: [N, K/2] uint8, [N, G], [N, G] -> [N, K] fp32."""
    codes = unpack_unsigned(packed).float()
    grouped = group(codes, codes.shape[-1] // scales.shape[-1])
    return grouped.mul_(scales.float().unsqueeze(-1)).add_(zeros.float().unsqueeze(-1)).flatten(-2)
