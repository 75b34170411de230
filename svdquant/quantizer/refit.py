"""The best branch, and the best bias, for codes that are already chosen: reduced-rank regression in closed form.

With x the smoothed inputs, q their rounded form and V the values on the grid, the branch should carry
W x - V q. Without a limit on rank the answer is M = W - V E[q x'] E[x x']^-1; with one it is the strongest part of M
in the metric of E[x x'] = S S', that is the SVD of M S. Activation rounding is repaired along with the weight's.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .branch import strongest
from .moments import Moments, cholesky
from .task import Fit, rounded


def refit_branch(fit: Fit, moments: Moments) -> Fit:
    """Both factors anew."""
    lower = cholesky(moments.xx)
    rounding = fit.values @ (moments.xq.T - moments.xx)
    wanted = fit.weight - fit.values - torch.cholesky_solve(rounding.T, lower).T
    factor, up = strongest(wanted @ lower, fit.task.rank, fit.task.generator())
    factor = torch.linalg.solve_triangular(lower.T, factor.T, upper=True).T
    return fit.with_branch(*balanced(factor, up))


def balanced(factor, up):
    """The same product with rows of equal length in both factors, so that 16 bits hold both well."""
    size = (factor.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return factor / size[:, None], up * size


def refit_up(fit: Fit, moments: Moments) -> Fit:
    """The second factor anew; the first has been rounded to 16 bits by now, and this makes up for it."""
    factor = fit.factor
    if not len(factor):
        return fit
    inner = factor @ moments.xx @ factor.T
    inner.diagonal().add_(1e-4 * inner.diagonal().mean())
    wanted = fit.weight @ (moments.xx @ factor.T) - fit.values @ (moments.xq.T @ factor.T)
    return replace(fit, up=rounded(torch.linalg.solve(inner, wanted.T).T))


def correct_bias(fit: Fit, moments: Moments) -> Fit:
    """Take the mean output error out through the bias."""
    mean = fit.weight @ moments.x - fit.values @ moments.q - fit.up @ (fit.factor @ moments.x)
    return replace(fit, bias=mean)
