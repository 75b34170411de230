"""Second moments of a linear's inputs before and after rounding: all that GPTQ and the refits need to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .task import Fit, round_inputs

CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Moments:
    """Averages over calibration rows, for smoothed inputs x and their rounded form q.

    xx, xq    [K, K]   fp32   E[x x'], E[x q']
    x, q      [K]      fp32   means
    q_square  [K]      fp32   E[q^2]
    """

    xx: Tensor
    xq: Tensor
    x: Tensor
    q: Tensor
    q_square: Tensor


def measure(fit: Fit) -> Moments:
    """Moments of the task's rows under the fit's smoothing, summed over chunks of rows."""
    task, k = fit.task, len(fit.smooth)
    like = fit.smooth
    xx, xq = (like.new_zeros(k, k) for _ in range(2))
    x_sum, q_sum, q_square = (like.new_zeros(k) for _ in range(3))
    for rows in task.sample.rows.split(CHUNK):
        p = task.inputs(rows)
        x, q = p.float() / fit.smooth, round_inputs(p, fit.smooth, task.spec)
        xx.addmm_(x.T, x)
        xq.addmm_(x.T, q)
        x_sum += x.sum(0)
        q_sum += q.sum(0)
        q_square += q.square().sum(0)
    count = len(task.sample.rows)
    return Moments(*(total / count for total in (xx, xq, x_sum, q_sum, q_square)))


def cholesky(c: Tensor, damping: float = 0.01) -> Tensor:
    """Lower factor of c + damping * mean(diagonal) * I, with ten times the damping as often as it takes.

    c   [K, K]   symmetric, positive up to rounding
    """
    mean = c.diagonal().mean().clamp(min=1e-30)
    for _ in range(8):
        damped = c.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return lower
        damping *= 10
    raise ValueError("moments: the inputs' covariance is not a covariance. Calibrate again.")
