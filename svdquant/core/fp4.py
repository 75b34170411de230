"""NVFP4: e2m1 codes in groups of 16 with e4m3 scales, and a second scale above them.

An e2m1 code is a sign bit over an index into 0, .5, 1, 1.5, 2, 3, 4, 6. Two roundings exist and differ on ties:
weights were encoded offline towards the smaller magnitude and never to -0, activations are encoded by the hardware
towards the even code, keeping the sign of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import NVFP4_GROUP, expand, group
from .int4 import pack_nibbles, unpack_unsigned

E2M1_MAX = 6.0
E4M3_MAX = 448.0


def _magnitudes(device: torch.device) -> Tensor:
    """0, .5, 1, 1.5, 2, 3, 4, 6 in fp32, made where they are used: a table copied to a GPU would be waited for."""
    index = torch.arange(8, device=device)
    power = (index // 2 - 1).clamp(min=0)
    return torch.where(index < 2, index, (2 + index % 2) << power) / 2


def _midpoints(x: Tensor) -> Tensor:
    """Where one magnitude is as near as the next."""
    values = _magnitudes(x.device)
    return ((values[1:] + values[:-1]) / 2).to(x.dtype)


def decode(codes: Tensor) -> Tensor:
    """Values of e2m1 codes: uint8 0..15 -> fp32."""
    values = _magnitudes(codes.device)
    return torch.cat((values, -values))[codes.int()]


def _index_down(x: Tensor) -> Tensor:
    """Index of the nearest magnitude, ties to the smaller one."""
    return torch.bucketize(x.abs(), _midpoints(x))


def encode_weight(x: Tensor) -> Tensor:
    """Offline rounding: nearest, ties to the smaller magnitude, never -0. Any float -> uint8 codes."""
    index = _index_down(x)
    negative = (x < 0) & (index > 0)
    return (index + 8 * negative).to(torch.uint8)


def encode_act(x: Tensor) -> Tensor:
    """Hardware rounding: nearest, ties to the even code, saturating, -0 kept. Any float -> uint8 codes."""
    low = _index_down(x)
    high = torch.bucketize(x.abs(), _midpoints(x), right=True)
    even = torch.where(low % 2 == 0, low, high)
    return (even + 8 * torch.signbit(x)).to(torch.uint8)


def to_e4m3(x: Tensor) -> Tensor:
    """Round to e4m3, saturating at 448 instead of becoming NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_weight(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Round a (smoothed, residual) weight to NVFP4 with one second scale for the tensor.

    w        [N, K]      fp32
    returns
      codes  [N, K/2]    uint8   packed e2m1
      scales [N, K/16]   e4m3
      second [1]         dtype   absmax / (6 * 448), so that no group scale saturates
    """
    w = w.float()
    second = (w.abs().max() / (E2M1_MAX * E4M3_MAX)).clamp(min=1e-30).to(dtype).reshape(1)
    grouped = group(w, NVFP4_GROUP) / second.float()
    scales = to_e4m3(grouped.abs().amax(-1) / E2M1_MAX)
    divisor = torch.where(scales.float() == 0, 1.0, scales.float()).unsqueeze(-1)
    return pack_nibbles(encode_weight((grouped / divisor).flatten(-2))), scales, second


def dequantize_weight(packed: Tensor, scales: Tensor, second_scale: Tensor) -> Tensor:
    """e2m1 * e4m3 scale * second scale in fp32.

    packed        [N, K/2]    uint8
    scales        [N, K/16]   e4m3
    second_scale  [1] | [N]   any float
    returns       [N, K]      fp32
    """
    values = decode(unpack_unsigned(packed))
    values = values * expand(scales.float(), values.shape[-1] // scales.shape[-1])
    return values * second_scale.float().reshape(-1, 1)
