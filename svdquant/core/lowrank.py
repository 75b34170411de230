"""The low-rank branch: the part of a smoothed weight that 4 bits should not carry.

W * smooth = up @ factor + residual, where `factor` acts on smoothed activations. Checkpoints store
down = factor / smooth, so that the branch sees raw activations and needs no division at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-R part of a matrix and what is left (arXiv 2411.05007, section 4.3).

    w          [N, K]   fp32 | fp64   already smoothed
    returns
      factor   [R, K]   first R rows of V^T (orthonormal)
      up       [N, R]   first R columns of U * S
      residual [N, K]   w - up @ factor
    """
    if not 0 <= rank <= min(w.shape):
        raise ValueError(
            f"low-rank split: rank {rank} is outside 0..{min(w.shape)} of a {tuple(w.shape)} weight."
        )
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    up, factor = u[:, :rank] * s[:rank], vt[:rank]
    return factor, up, w - up @ factor


def unsmooth(factor: Tensor, smooth: Tensor, dtype: torch.dtype) -> Tensor:
    """down = factor / smooth, as published packers divide and round it: [R, K], [K] -> [R, K] dtype."""
    return (factor.double() / smooth.double()).to(dtype)
