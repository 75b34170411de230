"""Recipes: which steps, in which order. docs/quantizing.md has the table that compares them.

    instant        no data: ten rounds of (branch of what the codes miss, nearest codes with least-error scales)
    svdquant       the paper's: the best of 39 smoothings, then rounds of (SVD, nearest codes) while the error falls
    svdquant+gptq  the same, its codes then chosen by GPTQ
    fast           19 smoothings, then twice (projected GPTQ, closed-form branch), bias correction
    best           as fast, with a learned smoothing

A recipe is a function from a fresh Fit to a finished one. `center`, in the task, is the caller's choice for any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import smoothing
from .branch import branch_of_rest, take_branch
from .gptq import gptq
from .moments import measure
from .refit import correct_bias, refit_branch, refit_up
from .rounding import nearest, scales_absmax, scales_mse
from .task import Fit, Task, squared_error, start

INSTANT_ROUNDS, PAPER_ROUNDS, PAPER_ROWS = 10, 100, 1024


def round_nearest(fit: Fit, *, clipped: bool) -> Fit:
    """Nearest codes of the residual, with absmax scales or those of least error."""
    residual = fit.residual
    grid = (scales_mse if clipped else scales_absmax)(residual, fit.task.spec)
    return replace(fit, grid=grid, values=nearest(residual, grid))


def settle_shift(fit: Fit) -> Fit:
    """Let the bias take out what the shift adds through the codes, rather than through the weight they stand for.

    Inputs behind a GELU lie nearer to 0 than to 0 + shift, so that errors of the codes then cost less.
    """
    missed = (fit.residual - fit.values) / fit.smooth
    return replace(fit, bias=missed @ fit.task.offset) if fit.task.spec.act_shift else fit


def instant(fit: Fit) -> Fit:
    """From the weight alone."""
    fit = round_nearest(take_branch(fit), clipped=True)
    for _ in range(INSTANT_ROUNDS - 1 if fit.task.rank else 0):
        fit = round_nearest(branch_of_rest(fit), clipped=True)
    return settle_shift(fit)


def paper_rounds(fit: Fit) -> Fit:
    """SVD of what the codes miss, nearest codes, again, until the output error rises for the first time."""
    rows = fit.task.sample.rows[:PAPER_ROWS]
    best = round_nearest(take_branch(fit), clipped=False)
    least = squared_error(best, rows)
    for _ in range(PAPER_ROUNDS - 1):
        tried = round_nearest(branch_of_rest(best), clipped=False)
        error = squared_error(tried, rows)
        if error > least:
            break
        best, least = tried, error
    return best


def svdquant(fit: Fit) -> Fit:
    """The paper's recipe, as its published tool runs it for one linear (arXiv 2411.05007, section 4)."""
    return paper_rounds(smoothing.search(fit, points=20, rows=512))


def svdquant_gptq(fit: Fit) -> Fit:
    """The paper's strongest published setting."""
    fit = svdquant(fit)
    return gptq(fit, measure(fit), projected=False, clipped=False)


def alternate(fit: Fit, *, rounds: int = 2) -> Fit:
    """Codes that leave to the branch what it can repair, then the branch that repairs it; the bias takes the rest."""
    fit, moments = take_branch(fit), measure(fit)
    for i in range(rounds):
        fit = gptq(fit, moments, projected=True, clipped=True)
        fit = refit_branch(fit, moments) if i < rounds - 1 else refit_up(fit, moments)
    return correct_bias(fit, moments)


def fast(fit: Fit) -> Fit:
    """Seconds a layer on a CPU."""
    return alternate(smoothing.search(fit))


def best(fit: Fit) -> Fit:
    """The smallest error of all recipes here."""
    return alternate(smoothing.learn(smoothing.search(fit)))


RECIPES: dict[str, Callable[[Fit], Fit]] = {
    "instant": instant,
    "fast": fast,
    "best": best,
    "svdquant": svdquant,
    "svdquant+gptq": svdquant_gptq,
}


def run(name: str, task: Task) -> Fit:
    """Quantize one linear by a recipe of RECIPES. ValueError for an unknown one, or one that lacks its sample."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}.")
    if name != "instant" and task.sample is None:
        raise ValueError(
            f"recipe {name}: expected calibration statistics, got none. Calibrate, or use instant."
        )
    silent = task.sample is not None and not bool(task.sample.rows.any())  # which tells of no input at all
    return RECIPES["instant" if silent else name](start(task))
