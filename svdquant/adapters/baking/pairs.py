"""Pairs of factors on their way into a stored branch: cut to the stored linear, put together, laid beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core.linear import Branch
from .places import Piece

Pair = tuple[Tensor, Tensor]  # down [r, K], up [N, r]


def cut(branch: Branch, piece: Piece) -> Pair | None:
    """The part of a host layer's branch that falls on a stored piece: down [r, k], up [n, r]; None where none does."""
    (r0, r1), (c0, c1) = (
        (max(a.start, b.start), min(a.stop, b.stop))
        for a, b in ((branch.rows, piece.rows), (branch.columns, piece.columns))
    )
    if r0 >= r1 or c0 >= c1:
        return None
    rank = branch.down.shape[0]
    down = branch.down.new_zeros(rank, piece.columns.stop - piece.columns.start)
    up = branch.up.new_zeros(piece.rows.stop - piece.rows.start, rank)
    down[:, c0 - piece.columns.start : c1 - piece.columns.start] = branch.down[
        :, c0 - branch.columns.start : c1 - branch.columns.start
    ]
    up[r0 - piece.rows.start : r1 - piece.rows.start] = branch.up[
        r0 - branch.rows.start : r1 - branch.rows.start
    ]
    return scaled(down, branch.strength), up


def scaled(down: Tensor, strength: float) -> Tensor:
    """The strength folded into `down`, rounded once; as it is at strength 1."""
    return down if strength == 1.0 else (down.float() * strength).to(down.dtype)


def stack(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs that share one `down` (q, k and v trained together) become one pair, their `up`s added."""
    stacked: list[Pair] = []
    for down, up in pairs:
        for i, (other, sum_so_far) in enumerate(stacked):
            apart = not bool(((up != 0).any(1) & (sum_so_far != 0).any(1)).any())
            if apart and torch.equal(down, other):
                stacked[i] = (other, sum_so_far + up)
                break
        else:
            stacked.append((down, up))
    return stacked


def widen(base: Mapping[str, Tensor], pairs: Sequence[Pair]) -> Pair:
    """A base branch with further pairs beside it: D = [D0 ; A ...], U = [U0 | B ...].

    base      down [R0, K], up [N, R0]
    returns   down [R, K], up [N, R] in the base's dtype
    """
    down, up = base["down"], base["up"]
    downs, ups = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.cat([down, *(d.to(down.dtype) for d in downs)]), torch.cat(
        [up, *(u.to(up.dtype) for u in ups)], 1
    )
