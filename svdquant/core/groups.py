"""Groups of K and their scales: the one definition of "a scale".

A scale is absmax / q_max of a group, where q_max is the largest code the quantizer emits. Activations follow the
published kernels to the bit: absmax times the fp32 constant 1/q_max (not a division), and the codes are chosen with
the unrounded fp32 scale while the rounded one multiplies back.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_GROUP = 64
NVFP4_GROUP = 16


def group(x: Tensor, size: int) -> Tensor:
    """Split the last axis into groups: [..., K] -> [..., K/size, size]."""
    if x.shape[-1] % size:
        raise ValueError(f"group: last axis is {x.shape[-1]}, expected a multiple of {size}. Pad K first.")
    return x.unflatten(-1, (-1, size))


def expand(scales: Tensor, size: int) -> Tensor:
    """Repeat each group's number over its columns: [..., G] -> [..., G*size]."""
    return scales.repeat_interleave(size, dim=-1)


def act_scale(x: Tensor, size: int, q_max: int) -> Tensor:
    """Unrounded fp32 activation scale of every token and group.

    x        [M, K]        any float   already smoothed (and shifted, where codes are unsigned)
    returns  [M, K/size]   fp32        max|x| * fp32(1/q_max); 0 for an all-zero group
    """
    return group(x, size).abs().amax(-1).float() * (1 / q_max)


def weight_scale(w: Tensor, size: int, q_max: int, dtype: torch.dtype) -> Tensor:
    """Weight scale as stored: absmax / q_max rounded to `dtype`, 1 where a group is all zero.

    w        [N, K]        fp32 | fp64
    returns  [N, K/size]   dtype
    """
    scale = (group(w, size).abs().amax(-1) / q_max).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)
