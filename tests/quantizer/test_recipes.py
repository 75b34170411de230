"""Whole recipes: in the right order of error, the same for a seed, and in a file what they were in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.core.weights import INT4, INT4_UNSIGNED, NVFP4
from svdquant_nodes.svdquant.quantizer.recipes import RECIPES, run
from svdquant_nodes.svdquant.quantizer.task import Sample, Task, freeze, relative_error
from svdquant_nodes.tests.quantizer.layer import make_task
from svdquant_nodes.tests.tolerances import assert_close

SPECS = [INT4, INT4_UNSIGNED, NVFP4]
IDS = ["int4", "int4-unsigned", "nvfp4"]


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_order_of_error(spec):
    error = {name: relative_error(run(name, make_task(spec))) for name in RECIPES}
    assert error["best"] < 1.01 * error["fast"]  # benchmarks/recipes.py tells the two apart, on real layers
    assert error["fast"] < error["svdquant+gptq"] < error["svdquant"] < error["instant"]


def test_centring_lowers_the_error_of_inputs_with_a_mean():
    assert relative_error(run("fast", make_task(centred=True))) < relative_error(run("fast", make_task()))


@pytest.mark.parametrize("name", RECIPES)
def test_same_seed_same_file(name):
    first, second = (freeze(run(name, make_task(n=128, k=64))) for _ in range(2))
    for field, tensor in first.tensors().items():
        assert torch.equal(tensor.float(), second.tensors()[field].float()), field


INPUTS = {name: (spec, False) for name, spec in zip(IDS, SPECS, strict=True)}
INPUTS |= {
    "int4-centred": (INT4, True),
    "nvfp4-centred": (NVFP4, True),
}  # after a GELU they are shifted instead


@pytest.mark.parametrize(("spec", "centred"), INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("name", ["instant", "fast"])
def test_the_frozen_linear_makes_the_error_that_was_reported(name, spec, centred):
    task = make_task(spec, centred=centred)
    fit, held = run(name, task), task.sample.held
    arrives = held if task.center is None else (held.float() - task.center).bfloat16()
    y = linear.linear(arrives, freeze(fit), reference)
    exact = held.float() @ task.weight.T + task.bias
    found = (y - exact).norm() / (exact - task.bias).norm()
    assert abs(found - relative_error(fit)) < 0.002


def test_bias_of_unsigned_layers_is_stored_as_published_files_store_it():
    task = make_task(INT4_UNSIGNED)
    made = freeze(run("svdquant", task))
    residual = task.weight.double() - made.up.double() @ made.down.double()
    assert_close(made.bias, task.bias.double() - residual.sum(1) * 0.171875, "bf16_output")


def test_without_data_the_bias_is_that_of_the_codes():
    task = make_task(INT4_UNSIGNED)
    made = freeze(run("instant", task))
    compensation = reference.residual(made).double().sum(1) * 0.171875
    assert_close(made.bias, task.bias.double() - compensation, "bf16_output")


def test_without_a_bias_none_is_invented():
    task = make_task()
    made = freeze(run("instant", Task(task.weight, None, INT4, 8)))
    assert made.bias is None


@pytest.mark.parametrize("name", RECIPES)
def test_silent_inputs_tell_nothing_and_the_weight_is_kept(name):
    task = make_task()
    silent = Sample.of(torch.zeros_like(task.sample.rows), torch.zeros_like(task.sample.held))
    made, alone = (freeze(run(n, replace(task, sample=s))) for n, s in ((name, silent), ("instant", None)))
    assert made.tensors().keys() == alone.tensors().keys()
    assert all(torch.equal(made.tensors()[field], t) for field, t in alone.tensors().items())


def test_rank_zero_works():
    task = make_task(rank=0)
    assert relative_error(run("best", task)) < relative_error(run("instant", task))


BAD = {
    "odd-width": (dict(weight=torch.zeros(8, 72)), "multiples of 64, got 72"),
    "large-rank": (dict(rank=9), r"rank: expected 0\.\.8"),
    "nan": (dict(weight=torch.full((8, 64), float("nan"))), "NaN or infinity"),
    "other-inputs": (dict(sample=make_task(k=128).sample), "inputs of 64 channels, got 128"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_tasks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Task(**(dict(weight=torch.zeros(8, 64), bias=None, spec=INT4, rank=4) | change))


def test_unknown_recipe_and_missing_statistics():
    task = Task(torch.zeros(8, 64), None, INT4, 4)
    with pytest.raises(ValueError, match=r"recipe: expected one of instant"):
        run("worst", task)
    with pytest.raises(ValueError, match=r"recipe best: expected calibration statistics"):
        run("best", task)
