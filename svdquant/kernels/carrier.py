"""How integers of four bits reach exact W4A4 on Hopper: each as an e4m3 number, and scales by groups.

Its products multiply e4m3, in which -15 to 15 are exact. So the quantizers of those spellings (`select.E4M3`) write
what they read: the numbers are the reference's, their types and the order of the scales are not.

    codes    [M, K]      float8_e4m3fn
    scales   [M, K/64]   fp32            a group's side by side, from a multiple of 16 bytes on
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
CODES, SCALES = torch.float8_e4m3fn, torch.float32


def empty(like: Tensor, m: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of [M, K] activations, not yet written, where `like` is."""
    scales = like.new_empty_strided((m, k // GROUP), (1, (m + 3) // 4 * 4), dtype=SCALES)
    return like.new_empty(m, k, dtype=CODES), scales


def carried(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as those products read them: what they are given, if their own quantizer made it.

    codes    [M, K]      int8 | uint8, or as above
    scales   [M, K/64]   any float, or as above
    """
    if codes.dtype == CODES:
        return codes, scales
    to_codes, to_scales = empty(codes, *codes.shape)
    return to_codes.copy_(codes), to_scales.copy_(scales)
