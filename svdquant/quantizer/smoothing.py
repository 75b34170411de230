"""The smoothing vector: which channels are made easier for the activations at the weight's expense.

    s = x_max^a / w_max^b, its geometric mean taken out      (arXiv 2411.05007, section 4.2)

`search` tries a grid of (a, b) and keeps what gives the smallest output error; (0, 0), no smoothing, is always among
them, because a badly fitted s is worse than none. `learn` then follows the gradient of the same error.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.groups import group
from ..core.weights import QuantSpec
from .branch import take_branch
from .rounding import T, nearest, scales_absmax, snap
from .task import Fit, squared_error

LIMIT = 1e4  # of s and 1/s: channels that calibration hardly saw must not run away
SEARCH_ROWS, LEARN_ROWS, JUDGE_ROWS = 256, 384, 512
LEARNING_RATE, REFRESH = 0.03, 15


def spans(fit: Fit) -> tuple[Tensor, Tensor]:
    """Largest |p| and largest |W| of every channel, [K] each."""
    task, seen = fit.task, fit.task.sample
    x_max = torch.maximum((seen.high + task.offset).abs(), (seen.low + task.offset).abs())
    return x_max.clamp(min=1e-5), task.weight.abs().amax(0).clamp(min=1e-5)


def vector(x_max: Tensor, w_max: Tensor, a: float, b: float) -> Tensor:
    """x_max^a / w_max^b with geometric mean 1, as bf16 holds it: [K], [K] -> [K] fp32."""
    s = x_max.pow(a) / w_max.pow(b)
    s = s / s.log().mean().exp()
    return s.clamp(1 / LIMIT, LIMIT).to(T).float()


def exponents(points: int) -> list[tuple[float, float]]:
    """(0, 0), then (a, 0) and (a, 1 - a) for points - 1 even steps of a."""
    steps = [i / points for i in range(1, points)]
    return [(0.0, 0.0)] + [(a, 0.0) for a in steps] + [(a, 1 - a) for a in steps]


def trial(fit: Fit) -> Fit:
    """The cheapest whole fit: branch by SVD, nearest codes, absmax scales."""
    fit = take_branch(fit)
    residual = fit.residual
    grid = scales_absmax(residual, fit.task.spec)
    return replace(fit, grid=grid, values=nearest(residual, grid))


def some_rows(fit: Fit, count: int) -> Tensor:
    """A fixed random choice of calibration rows."""
    rows = fit.task.sample.rows
    return rows[torch.randperm(len(rows), generator=fit.task.generator(), device=rows.device)[:count]]


def search(fit: Fit, *, points: int = 10, rows: int = SEARCH_ROWS) -> Fit:
    """The candidate whose trial has the smallest output error; 2 * points - 1 are tried."""
    x_max, w_max = spans(fit)
    x = some_rows(fit, rows)
    tried = [fit.with_smooth(vector(x_max, w_max, a, b)) for a, b in exponents(points)]
    return min(tried, key=lambda one: squared_error(trial(one), x))


def fixed(fit: Fit, *, alpha: float = 0.5) -> Fit:
    """One exponent, no search."""
    return fit.with_smooth(vector(*spans(fit), alpha, 1 - alpha))


def learn(fit: Fit, *, steps: int = 60) -> Fit:
    """Follow the gradient of the output error in log s; never ends worse than it began on the rows that judge.

    Rounding passes gradients straight through. The branch is refreshed now and then, and only refreshed points,
    judged like those of the search, can be taken.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _descend(fit, steps)


def _descend(fit: Fit, steps: int) -> Fit:
    task, draw = fit.task, fit.task.generator()
    weight, rows = task.weight.clone(), task.inputs(task.sample.rows).float()
    judge = some_rows(fit, JUDGE_ROWS).clone()
    log_s = fit.smooth.log().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([log_s], lr=LEARNING_RATE)
    best, least, target = fit, float("inf"), weight
    for step in range(steps + 1):
        if step % REFRESH == 0 or step == steps:
            tried = trial(fit.with_smooth(log_s.detach().exp().to(T).float()))
            target = weight - tried.up @ tried.down
            error = squared_error(tried, judge)
            if error < least:
                best, least = tried, error
        if step < steps:
            x = rows[torch.randint(len(rows), (LEARN_ROWS,), generator=draw, device=rows.device)]
            s = log_s.exp()
            y = rounded_through(x / s, task.spec, acts=True) @ rounded_through(target * s, task.spec).T
            optimizer.zero_grad()
            (y - x @ target.T).square().mean().backward()
            optimizer.step()
    return fit.with_smooth(best.smooth)


def rounded_through(x: Tensor, spec: QuantSpec, *, acts: bool = False) -> Tensor:
    """x on the 4-bit grid; backwards as if codes were not rounded, while scales follow the largest value."""
    unsigned = acts and spec.act_shift > 0
    top = 6.0 if spec.format == "nvfp4" else 15.0 if unsigned else 7.0
    grouped = group(x, spec.group)
    largest = grouped.amax(-1, keepdim=True) if unsigned else grouped.abs().amax(-1, keepdim=True)
    step = largest.clamp(min=1e-8) / top
    units = (grouped / step).detach()
    codes = units.round().clamp(min=0) if unsigned else snap(units, spec)
    return (grouped + (codes - units) * step).flatten(-2)
