"""The best low-rank part of a difference, and how far it is from the whole: computed, never estimated."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...core.linear import Branch
from .factors import Factored, largest_worth, pair

FIRST_SKETCH = 64
SKETCH_EXTRA = 8
SEED = 0
EXACT = 1e-5  # what is nearer than this is the rounding of fp32 factors


def error_limit() -> float:
    """Largest relative error a truncation may have before the difference is kept whole (SVDQUANT_LORA_ERROR).

    Raises ValueError where the setting is no number.
    """
    setting = os.environ.get("SVDQUANT_LORA_ERROR") or "0.001"
    try:
        return float(setting)
    except ValueError:
        raise ValueError(f"SVDQUANT_LORA_ERROR: expected a number such as 0.001, got {setting!r}.") from None


def truncated(delta: Tensor, limit: float, most: int | None = None) -> Factored | None:
    """The fewest ranks that reproduce a difference within a relative error, None where too many are needed.

    delta    [n, k]  fp32
    limit            largest ||delta - up @ down|| / ||delta||
    most             the highest rank to try, however flat the spectrum; by default, the highest whose factors take
                     less memory than the weight, and only where the first few ranks show that it will do

    A seeded random sketch finds the range (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4). The error
    returned is measured on the result.
    """
    n, k = delta.shape
    hurried, most = most is None, min(n, k, largest_worth(n, k) if most is None else most)
    total = _energy(delta)
    if not total:
        return Factored(())
    sketch = min(FIRST_SKETCH, n, k)
    while True:
        basis = _range(delta, min(sketch + SKETCH_EXTRA, n, k))
        inner = basis.T @ delta
        lost = _energy(delta - basis @ inner)  # not total - captured, which is blind below 3e-4 of the norm
        if lost <= (0.9 * limit) ** 2 * total:
            return _trimmed(delta, basis, inner, lost, limit, most)
        if sketch >= most or (hurried and lost > 0.25 * total):
            return None
        sketch = min(2 * sketch, most)


def _energy(delta: Tensor) -> float:
    return float(delta.norm()) ** 2


def _range(delta: Tensor, width: int) -> Tensor:
    """An orthonormal basis of what `width` random directions, sharpened once, see of a matrix."""
    generator = torch.Generator().manual_seed(SEED)
    probe = torch.randn(delta.shape[1], width, generator=generator).to(delta)
    basis = torch.linalg.qr(delta @ probe).Q
    return torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q


def _trimmed(
    delta: Tensor, basis: Tensor, inner: Tensor, lost: float, limit: float, most: int
) -> Factored | None:
    u, s, vt = torch.linalg.svd(inner, full_matrices=False)
    tails = s.double().square().flip(0).cumsum(0).flip(0)  # energy of rank i and all after it
    rank = int((lost + tails > (0.99 * limit) ** 2 * _energy(delta)).sum())
    if rank > most:
        return None
    branch = pair(vt[:rank].contiguous(), (basis @ u[:, :rank]) * s[:rank])
    error = (_energy(delta - branch.up @ branch.down) / _energy(delta)) ** 0.5
    return Factored((branch,), error if error > EXACT else 0.0) if error <= max(limit, EXACT) else None


def needed(delta: Tensor, limit: float, most: int) -> tuple[int, float]:
    """The rank that a relative error takes, and the error of the best `most` ranks; roughly, for a message."""
    delta = delta if delta.shape[0] <= delta.shape[1] else delta.T
    energy = torch.linalg.eigvalsh(delta @ delta.T).double().clamp(min=0).flip(0)
    left = 1 - (energy / energy.sum()).cumsum(0)
    rank = int((left > limit**2).sum()) + 1
    return min(rank, len(energy)), float(left[min(most, len(left)) - 1].clamp(min=0).sqrt())


def kron_pair(branch: Branch, limit: float, most: int) -> Factored | None:
    """A Kronecker product as one pair: exact if its rank is at most `most`, else the fewest ranks within a limit.

    Its singular vectors are those of its factors, multiplied: s1_i * s2_j belongs to u1_i (x) u2_j and v1_i (x) v2_j.
    So the best pair of every rank is known without forming the product.
    """
    second = branch.down.float() if branch.up is None else branch.up.float() @ branch.down.float()
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(x.float(), full_matrices=False) for x in (branch.kron, second)
    )
    values = torch.outer(s1, s2).flatten().double()
    order = values.argsort(descending=True, stable=True)
    values, total = values[order], values.square().sum()
    rank = int((values > EXACT * values[0]).sum())
    if rank > most:
        tails = values.square().flip(0).cumsum(0).flip(0)
        rank = int((tails > limit**2 * total).sum())
    if rank > most:
        return None
    i, j = order[:rank] // len(s2), order[:rank] % len(s2)
    up = torch.einsum("ar,br->abr", u1[:, i] * s1[i], u2[:, j] * s2[j]).flatten(0, 1)
    down = torch.einsum("ra,rb->rab", v1[i], v2[j]).flatten(1)
    error = float((values[rank:].square().sum() / total).sqrt()) if total else 0.0
    found = Branch(down, up, branch.strength, branch.rows, branch.columns)
    return Factored((found,), error if error > EXACT else 0.0)
