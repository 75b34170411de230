"""GPTQ: round a weight column by column, and let the columns not yet rounded repair what each rounding spoils.

Source: arXiv 2210.17323, with columns in the order of their inputs' energy and group scales chosen beforehand. What
the branch can repair afterwards is taken out of the Hessian first (`project`), so that the codes spend nothing on it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.weights import QuantSpec
from .moments import Moments, cholesky
from .rounding import scales_absmax, scales_mse, snap
from .task import Fit

BLOCK = 128
DAMPING = 0.01


def round_columns(w: Tensor, steps: Tensor, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """w on the grid of `steps`, nearly as near to w as that grid allows in the metric of the Hessian.

    w, steps  [N, K]   fp32
    hessian   [K, K]   fp32   E[x x'] of the inputs, symmetric
    returns   [N, K]   fp32
    """
    hessian = hessian.clone()
    unused = hessian.diagonal() <= 0
    hessian[unused, unused] = 1.0
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(cholesky(hessian[order][:, order], DAMPING))
    upper, _ = torch.linalg.cholesky_ex(inverse, upper=True)
    w, steps, done = w[:, order].T.contiguous(), steps[:, order].T.contiguous(), []  # columns become rows
    for begin in range(0, len(order), BLOCK):
        block = slice(begin, begin + BLOCK)
        values, errors = _round_block(w[block], steps[block], upper[block, block], spec)
        w[begin + BLOCK :] -= upper[block, begin + BLOCK :].T @ errors
        done.append(values)
    result = torch.empty_like(w)
    result[order] = torch.cat(done)
    return result.T.contiguous()


def _round_block(w: Tensor, steps: Tensor, upper: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """One block of columns, as rows [B, N]: the values and the errors that later blocks repair."""
    w, values, errors = w.clone(), torch.empty_like(w), torch.empty_like(w)
    for i in range(len(w)):
        values[i] = snap(w[i] / steps[i], spec) * steps[i]
        errors[i] = (w[i] - values[i]) / upper[i, i]
        w[i + 1 :] -= torch.outer(upper[i, i + 1 :], errors[i])
    return values, errors


def project(hessian: Tensor, factor: Tensor) -> Tensor:
    """H - H A' (A H A')^-1 A H: what the branch's inputs A x tell of x is free. [K, K], [R, K] -> [K, K]."""
    if not len(factor):
        return hessian
    seen = hessian @ factor.T
    inner = factor @ seen
    inner.diagonal().add_(1e-6 * inner.diagonal().mean())
    left = hessian - seen @ torch.linalg.solve(inner, seen.T)
    return (left + left.T) / 2


def gptq(fit: Fit, moments: Moments, *, projected: bool, clipped: bool) -> Fit:
    """Choose codes for the residual.

    projected   leave to the branch what a refit will repair
    clipped     group scales with the smallest weighted rounding error, instead of absmax
    """
    residual, spec = fit.residual, fit.task.spec
    grid = scales_mse(residual, spec, moments.q_square) if clipped else scales_absmax(residual, spec)
    hessian = project(moments.xx, fit.factor) if projected else moments.xx
    return replace(fit, grid=grid, values=round_columns(residual, grid.steps(), hessian, spec))
