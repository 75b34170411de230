"""Each step does what its formula says, and none makes the held-out error larger."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from svdquant_nodes.svdquant.core.weights import INT4, INT4_UNSIGNED, NVFP4
from svdquant_nodes.svdquant.quantizer import recipes, smoothing
from svdquant_nodes.svdquant.quantizer.branch import branch_of_rest, strongest, take_branch
from svdquant_nodes.svdquant.quantizer.gptq import gptq, project, round_columns
from svdquant_nodes.svdquant.quantizer.moments import CHUNK, cholesky, measure
from svdquant_nodes.svdquant.quantizer.refit import balanced, correct_bias, refit_branch, refit_up
from svdquant_nodes.svdquant.quantizer.rounding import nearest, scales_absmax
from svdquant_nodes.svdquant.quantizer.task import outputs, relative_error, round_inputs, squared_error, start
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.quantizer.layer import make_task
from svdquant_nodes.tests.tolerances import assert_close

SPECS = [INT4, INT4_UNSIGNED, NVFP4]
IDS = ["int4", "int4-unsigned", "nvfp4"]


class TestBranch:
    def test_randomized_is_as_good_as_exact(self):
        m = torch.randn(300, 200) @ torch.diag(torch.linspace(1, 0.05, 200))
        factor, up = strongest(m, 16, torch.Generator().manual_seed(0))
        exact = torch.linalg.svdvals(m.double())[16:].square().sum().sqrt()
        assert torch.dist(m, up @ factor) < 1.005 * exact

    def test_a_matrix_of_that_rank_is_taken_whole(self):
        m = torch.randn(300, 8) @ torch.randn(8, 200)
        factor, up = strongest(m, 8, torch.Generator().manual_seed(0))
        assert torch.dist(m, up @ factor) < 1e-5 * m.norm()

    def test_a_new_branch_drops_the_codes_of_the_old_one(self):
        fit = take_branch(recipes.round_nearest(start(make_task()), clipped=False))
        assert fit.values is None and fit.grid is None

    def test_the_branch_of_the_rest_is_what_the_codes_miss(self):
        fit = recipes.round_nearest(start(make_task(n=64, k=64, rank=64)), clipped=False)
        rest = branch_of_rest(fit)
        missed = fit.weight - fit.values
        assert torch.dist(rest.up @ rest.factor, missed) < 0.01 * missed.norm()  # factors of 16 bits

    def test_rank_zero_is_empty(self):
        factor, up = strongest(torch.randn(12, 8), 0, torch.Generator())
        assert factor.shape == (0, 8)
        assert up.shape == (12, 0)


class TestGptq:
    def test_unrelated_inputs_give_the_nearest_codes(self):
        w = torch.randn(16, 192)
        grid = scales_absmax(w, INT4)
        hessian = torch.diag(torch.rand(192) + 0.1)
        assert torch.equal(round_columns(w, grid.steps(), hessian, INT4), nearest(w, grid))

    def test_less_error_than_nearest_in_the_hessians_metric(self):
        w, x = torch.randn(32, 192), torch.randn(500, 40) @ torch.randn(40, 192)
        grid = scales_absmax(w, INT4)
        ours = round_columns(w, grid.steps(), x.T @ x / 500, INT4)
        assert torch.dist(x @ ours.T, x @ w.T) < 0.5 * torch.dist(x @ nearest(w, grid).T, x @ w.T)

    def test_a_rounding_error_is_repaired_by_the_next_column(self):
        # On a grid of 1, with correlation 0.8: 0.4 becomes 0, its error 0.4 moves 0.8 * 0.4 = 0.32 over to the 0.3
        # behind it, and 0.62 becomes 1. Alone 0.3 would become 0.
        w, hessian = torch.tensor([[0.4, 0.3]]), torch.tensor([[1.001, 0.8], [0.8, 1.0]])
        assert round_columns(w, torch.ones(1, 2), hessian, INT4).tolist() == [[0, 1]]

    def test_the_weight_itself_is_not_touched(self):
        w, x = torch.randn(8, 192), torch.randn(300, 192)
        before, hessian = w.clone(), x.T @ x / 300
        kept = hessian.clone()
        round_columns(w, torch.ones(8, 192), hessian, INT4)
        assert torch.equal(w, before) and torch.equal(hessian, kept)

    def test_unused_columns_are_rounded_too(self):
        w, hessian = torch.randn(8, 64), torch.eye(64)
        hessian[3, 3] = 0
        grid = scales_absmax(w, INT4)
        assert torch.equal(round_columns(w, grid.steps(), hessian, INT4), nearest(w, grid))

    def test_projection_forgives_what_the_branch_can_repair_and_nothing_else(self):
        x, factor = torch.randn(500, 64), torch.randn(4, 64)
        hessian = x.T @ x / 500
        left = project(hessian, factor)
        repairable, other = torch.randn(3, 4) @ factor, torch.randn(3, 64)
        assert ((repairable @ left) * repairable).sum() < 1e-4 * ((repairable @ hessian) * repairable).sum()
        assert ((other @ left) * other).sum() > 0.5 * ((other @ hessian) * other).sum()


class TestRefit:
    def test_full_rank_is_the_least_squares_answer(self):
        fit = recipes.round_nearest(start(make_task(n=64, k=64, rank=64)), clipped=False)
        fit = refit_branch(fit, measure(fit))
        p = fit.task.inputs(fit.task.sample.rows)
        x, q = p.double(), round_inputs(p, fit.smooth, INT4).double()
        wanted = x @ fit.weight.T.double() - q @ fit.values.T.double()
        least = torch.dist(x @ torch.linalg.lstsq(x, wanted).solution, wanted)
        ours = torch.dist(x @ (fit.up @ fit.factor).double().T, wanted)
        assert least <= ours < 1.1 * least  # damping, and factors of 16 bits

    def test_branch_lowers_the_error(self):
        fit = recipes.round_nearest(take_branch(start(make_task())), clipped=False)
        again = refit_branch(fit, measure(fit))
        assert relative_error(again) < relative_error(fit)

    def test_second_factor_alone_lowers_it_too(self):
        fit = recipes.round_nearest(take_branch(start(make_task())), clipped=False)
        again = refit_up(fit, measure(fit))
        assert torch.equal(again.down, fit.down)
        assert relative_error(again) < relative_error(fit)

    def test_second_factor_is_the_answer_with_a_damping_of_1e_4(self):
        """In float64, of rows so alike that the damping shows."""
        task = make_task(n=24, k=64)
        fit, spread = start(task), torch.zeros(64)
        spread[::2] = 0.4
        down = torch.stack([torch.ones(64), 3 + spread])
        fit = replace(fit, down=down, values=layers.random(24, 64, seed=3, scale=0.1))
        xx = torch.diag(torch.linspace(0.5, 2, 64))
        found = replace(measure(fit), xx=xx, xq=xx + layers.random(64, 64, seed=4, scale=0.05))
        f, w, v, x, q = (t.double().numpy() for t in (down, fit.weight, fit.values, found.xx, found.xq))
        inner = f @ x @ f.T
        damped = inner + 1e-4 * np.trace(inner) / 2 * np.eye(2)
        wanted = np.linalg.solve(damped, f @ (x @ w.T - q @ v.T)).T
        up = refit_up(fit, found).up
        assert_close(up, wanted, "bf16_output")
        assert torch.equal(up, up.bfloat16().float())

    def test_a_first_factor_with_equal_rows_can_be_refitted(self):
        """Two ranks that say the same leave the second factor undetermined."""
        fit = recipes.round_nearest(take_branch(start(make_task())), clipped=False)
        twice = replace(fit, down=fit.down[:1].expand(2, -1), up=fit.up[:, :2])
        again = refit_up(twice, measure(twice))
        assert bool(again.up.isfinite().all()) and relative_error(again) < relative_error(twice)

    def test_balanced_factors_share_their_length(self):
        factor, up = balanced(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), torch.tensor([[20.0, 0.0], [0.0, 0.4]]))
        # lengths 5 and 20 become 10, 0.1 and 0.4 become 0.2
        assert_close(factor, torch.tensor([[6.0, 8.0], [0.0, 0.2]]), "fp32_sum")
        assert_close(up, torch.tensor([[10.0, 0.0], [0.0, 0.2]]), "fp32_sum")

    def test_bias_takes_the_mean_error_out(self):
        task = make_task(INT4_UNSIGNED)
        fit = recipes.round_nearest(take_branch(start(task)), clipped=False)
        fit = correct_bias(fit, measure(fit))
        rows = task.sample.rows
        left = (outputs(fit, rows) - task.inputs(rows).float() @ task.weight.T).mean(0)
        assert left.abs().max() < 1e-4 * task.weight.norm()


class TestSmoothing:
    def test_vector_by_hand(self):
        # 16^.5 / 1^.5 and 1^.5 / 16^.5 have the geometric mean 1; without b, 4 and 1 have the mean 2
        x_max, w_max = torch.tensor([16.0, 1.0]), torch.tensor([1.0, 16.0])
        assert smoothing.vector(x_max, w_max, 0.5, 0.5).tolist() == [4, 0.25]
        assert smoothing.vector(x_max, w_max, 0.5, 0.0).tolist() == [2, 0.5]

    def test_exponents_by_hand(self):
        alone, shared = [(0.25, 0), (0.5, 0), (0.75, 0)], [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
        assert smoothing.exponents(4) == [(0, 0), *alone, *shared]

    def test_all_candidates_are_scaled_alike(self):
        for a, b in smoothing.exponents(10):
            s = smoothing.vector(torch.rand(64) + 0.1, torch.rand(64) + 0.1, a, b)
            assert abs(s.log().mean()) < 1e-3

    def test_a_channel_that_was_never_seen_stays_within_bounds(self):
        s = smoothing.vector(torch.tensor([1e-5] + [100.0] * 63), torch.ones(64), 1.0, 0.0)
        assert s.min() >= 1 / smoothing.LIMIT
        assert s.max() <= smoothing.LIMIT

    def test_search_is_no_worse_than_nothing_on_what_it_looked_at(self):
        fit = start(make_task())
        found, rows = smoothing.search(fit), smoothing.some_rows(fit, smoothing.SEARCH_ROWS)
        assert squared_error(smoothing.trial(found), rows) < 0.7 * squared_error(smoothing.trial(fit), rows)

    @pytest.mark.parametrize("spec", SPECS, ids=IDS)
    def test_learning_is_no_worse_than_the_search_and_works_in_inference_mode(self, spec):
        with torch.inference_mode():
            found = smoothing.search(start(make_task(spec)))
            learned = smoothing.learn(found)
            judge = smoothing.some_rows(found, smoothing.JUDGE_ROWS)
            before, after = (squared_error(smoothing.trial(one), judge) for one in (found, learned))
        assert after < before

    @pytest.mark.parametrize("spec", SPECS, ids=IDS)
    def test_rounding_through_is_the_rounding_that_runs(self, spec):
        p = make_task(spec).inputs(make_task(spec).sample.rows).float()
        ours = smoothing.rounded_through(p, spec, acts=True)
        exact = round_inputs(p, torch.ones(p.shape[1]), spec)
        limit = 0.03 if spec.format == "nvfp4" else 0.012  # run-time scales are e4m3 and bf16
        assert torch.dist(ours, exact) <= limit * exact.norm()


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_moments_are_averages_over_the_rows(spec):
    """In float64, over more rows than are taken at a time."""
    task = make_task(spec, k=64, rows=CHUNK + 100)
    fit = start(task).with_smooth(torch.linspace(0.5, 2, 64))
    p = task.inputs(task.sample.rows)
    x, q = (p.double() / fit.smooth.double()).numpy(), round_inputs(p, fit.smooth, spec).double().numpy()
    found = measure(fit)
    assert_close(found.xx, x.T @ x / len(x), "fp32_sum")
    assert_close(found.xq, x.T @ q / len(x), "fp32_sum")
    assert_close(found.x, x.mean(0), "fp32_sum")
    assert_close(found.q, q.mean(0), "fp32_sum")
    assert_close(found.q_square, (q * q).mean(0), "fp32_sum")


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_every_step_lowers_the_held_out_error(spec):
    fit = start(make_task(spec))
    plain = recipes.round_nearest(fit, clipped=False)
    searched = smoothing.search(fit)
    branch = smoothing.trial(searched)
    moments = measure(branch)
    coded = gptq(branch, moments, projected=True, clipped=True)
    refitted = refit_branch(coded, moments)
    errors = [relative_error(one) for one in (plain, branch, refitted)]
    assert errors == sorted(errors, reverse=True)
    assert (
        relative_error(correct_bias(refitted, moments)) < 1.002 * errors[-1]
    )  # the synthetic mean error is none


def test_a_covariance_of_too_few_rows_is_damped_until_it_factors():
    x = torch.randn(3, 64) * 100
    lower = cholesky(x.T @ x, damping=1e-12)
    assert bool(torch.isfinite(lower).all())


def test_what_is_no_covariance_is_refused():
    with pytest.raises(ValueError, match="not a covariance"):
        cholesky(torch.full((4, 4), float("nan")))
