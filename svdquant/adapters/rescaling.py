"""Adapters that rescale or turn the weight itself, as the difference they make to it, in the way ComfyUI computes them.

DoRA   W' = (W + D) * magnitude / norm    row by row, where the norm is W's; or column by column, where it is W + D's
OFT    W' = R W                           R turns blocks of rows; Cayley: R = (I + Q) (I - Q)^-1, Q skew
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import factors
from .factors import Members


def difference(members: Members, weight: Tensor, strength: float) -> Tensor | None:
    """What such an adapter at a strength adds to a weight; None for what is neither of the two.

    weight   [n, k]   fp32   as patched so far
    returns  [n, k]   fp32
    """
    if "dora_scale" in members:
        plain = factors.dense({tail: t for tail, t in members.items() if tail != "dora_scale"})
        return None if plain is None else strength * (_dora(members["dora_scale"], weight, plain) - weight)
    if "oft_blocks" in members and members["oft_blocks"].ndim == 3 and "rescale" not in members:
        # strength twice, as ComfyUI has it: it blends the turn with the identity, and what comes of that with W
        return strength**2 * _turned(
            members["oft_blocks"].to(weight), weight, float(members.get("alpha", 0.0))
        )
    return None


def _dora(magnitude: Tensor, weight: Tensor, plain: Tensor) -> Tensor:
    moved, magnitude = weight + plain, magnitude.to(weight)
    by_rows = magnitude.shape[0] == weight.shape[0]
    norm = weight.norm(dim=1, keepdim=True) if by_rows else moved.norm(dim=0, keepdim=True)
    return moved * (magnitude.reshape(norm.shape) / (norm + torch.finfo(weight.dtype).eps))


def _turned(blocks: Tensor, weight: Tensor, most: float) -> Tensor:
    """R W - W; `most`, if any, bounds the norm of Q."""
    skew = blocks - blocks.transpose(1, 2)
    norm = float(skew.norm()) + 1e-8
    if 0 < most < norm:
        skew = skew * (most / norm)
    one = torch.eye(blocks.shape[1], dtype=weight.dtype, device=weight.device)
    turn = (one + skew) @ torch.linalg.inv(one - skew) - one
    rows = weight.unflatten(0, blocks.shape[:2])
    return (turn.transpose(1, 2) @ rows).flatten(0, 1)
