"""Adapters that rescale or turn the weight itself, as the difference they make to it, in the way ComfyUI computes them.

DoRA   W' = (W + D) * magnitude / norm    row by row, where the norm is W's; or column by column, where it is W + D's
OFT    W' = R W                           R turns blocks of rows; Cayley: R = (I + Q) (I - Q)^-1, Q skew
BOFT   W' = s R_m .. R_1 W                as a butterfly: R_i turns blocks that take half of their rows from 2^i b/2
                                          rows further down, b the size of a block; s, if any, scales the rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import factors
from .factors import Members


def difference(members: Members, weight: Tensor, strength: float) -> Tensor | None:
    """What such an adapter at a strength adds to a weight; None for what is none of them, or does not fit.

    weight   [n, k]   fp32   as patched so far
    returns  [n, k]   fp32
    """
    blocks = members.get("oft_blocks")
    if "dora_scale" in members:
        moved = None if blocks is not None else _plain(members, weight)
        return None if moved is None else strength * (_dora(members["dora_scale"], weight, moved) - weight)
    if blocks is None or misfit(blocks, len(weight)):
        return None
    turns = _turns(blocks.to(weight), float(members.get("alpha", 0.0)))
    # strength twice, as ComfyUI has it: it blends the turns with the identity, and what comes of that with W
    if blocks.ndim == 3:  # whose rescale ComfyUI leaves out
        return strength**2 * (_by_blocks(turns.transpose(1, 2), weight) - weight)
    return strength * (_butterfly(turns, weight, strength) * _scale(members, weight) - weight)


def misfit(blocks: Tensor, height: int) -> str:
    """Why OFT's or BOFT's blocks cannot turn a weight of so many rows; empty where they can."""
    count, size = blocks.shape[-3], blocks.shape[-1]
    if count * size != height:
        return f"expected {height} rows, got {count} blocks of {size}"
    span = size if blocks.ndim == 3 else 2 ** (len(blocks) - 1) * size
    if height % span or (blocks.ndim == 4 and size % 2):
        return f"expected {height} rows, got {len(blocks)} stages of which the last spans {span}"
    return ""


def _plain(members: Members, weight: Tensor) -> Tensor | None:
    """What is added before DoRA sets the norms."""
    undecomposed = {tail: t for tail, t in members.items() if tail != "dora_scale"}
    if "a1.weight" not in members:
        return factors.dense(undecomposed)
    pair = factors.glora(undecomposed, weight)
    return None if pair is None else pair.difference()


def _dora(magnitude: Tensor, weight: Tensor, plain: Tensor) -> Tensor:
    moved, magnitude = weight + plain, magnitude.to(weight)
    by_rows = magnitude.shape[0] == weight.shape[0]
    norm = weight.norm(dim=1, keepdim=True) if by_rows else moved.norm(dim=0, keepdim=True)
    return moved * (magnitude.reshape(norm.shape) / (norm + torch.finfo(weight.dtype).eps))


def _turns(blocks: Tensor, most: float) -> Tensor:
    """The orthogonal matrices of skew ones; `most`, if any, bounds the norm of all of those together."""
    skew = blocks - blocks.transpose(-1, -2)
    norm = float(skew.norm()) + 1e-8
    if 0 < most < norm:
        skew = skew * (most / norm)
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return (one + skew) @ torch.linalg.inv(one - skew)


def _by_blocks(turns: Tensor, rows: Tensor) -> Tensor:
    """turns [c, b, b] times each of the c blocks of b rows."""
    return (turns @ rows.unflatten(0, turns.shape[:2])).flatten(0, 1)


def _butterfly(turns: Tensor, weight: Tensor, strength: float) -> Tensor:
    """R_m .. R_1 W, each R blended with the identity."""
    size = turns.shape[-1]
    one = torch.eye(size, dtype=weight.dtype, device=weight.device)
    for i, turn in enumerate(turns):
        order = torch.arange(len(weight)).reshape(-1, 2, 2**i * size // 2).transpose(1, 2).flatten()
        mixed = _by_blocks(strength * turn + (1 - strength) * one, weight[order])
        weight = torch.empty_like(weight).index_copy_(0, order.to(weight.device), mixed)
    return weight


def _scale(members: Members, weight: Tensor) -> Tensor | float:
    scale = members.get("rescale")
    return 1.0 if scale is None else scale.to(weight).reshape(-1, 1)
