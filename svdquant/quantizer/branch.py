"""The strongest low-rank part of a matrix, by a randomized SVD where an exact one would cost seconds a layer.

Published comparisons and the table in docs/quantizing.md find no difference in the outcome.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .task import Fit

OVERSAMPLE, POWER_STEPS = 16, 4


def strongest(m: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-R approximation, up to randomness in the last digits.

    m        [N, K]   fp32
    returns
      factor [R, K]   orthonormal rows
      up     [N, R]
    """
    if rank == 0:
        return m.new_zeros(0, m.shape[1]), m.new_zeros(m.shape[0], 0)
    width = rank + OVERSAMPLE
    if min(m.shape) <= 2 * width:
        u, s, vt = torch.linalg.svd(m, full_matrices=False)
    else:
        basis = m @ torch.randn(m.shape[1], width, generator=generator, device=m.device, dtype=m.dtype)
        for _ in range(POWER_STEPS):
            basis = torch.linalg.qr(m.T @ torch.linalg.qr(basis).Q).Q
            basis = m @ basis
        basis = torch.linalg.qr(basis).Q
        u, s, vt = torch.linalg.svd(basis.T @ m, full_matrices=False)
        u = basis @ u
    return vt[:rank], u[:, :rank] * s[:rank]


def take_branch(fit: Fit) -> Fit:
    """Put the strongest part of the smoothed weight into the branch (arXiv 2411.05007, section 4.3)."""
    factor, up = strongest(fit.weight, fit.task.rank, fit.task.generator())
    return replace(fit, values=None, grid=None).with_branch(factor, up)


def branch_of_rest(fit: Fit) -> Fit:
    """Put the strongest part of what the codes miss into the branch."""
    factor, up = strongest(fit.weight - fit.values, fit.task.rank, fit.task.generator())
    return fit.with_branch(factor, up)
