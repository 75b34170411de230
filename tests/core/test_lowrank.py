from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import lowrank
from svdquant_nodes.tests import golden, layers
from svdquant_nodes.tests.tolerances import assert_close

INT4_CASES = ["c0", "c1", "c2", "c3"]  # c4 has no smooth, c5 has it inside the layer before


@pytest.mark.parametrize("prefix", INT4_CASES)
def test_golden_down_int4(prefix):
    t = golden.case("svdq_int4_linear", f"{prefix}.logical")
    assert torch.equal(lowrank.unsmooth(t["branch_a"], t["smooth"], t["branch_a"].dtype), t["lora_down"])


@pytest.mark.parametrize("prefix", ["f0", "f1", "f2"])
def test_golden_down_nvfp4(prefix):
    t = golden.case("svdq_nvfp4_linear", f"{prefix}.logical")
    assert torch.equal(lowrank.unsmooth(t["branch_a"], t["smooth"], torch.bfloat16), t["lora_down"])


def test_golden_unshifted_down_is_the_factor_where_smooth_was_fused():
    t = golden.case("svdq_int4_linear", "c5.logical")
    assert torch.equal(t["lora_down"], t["branch_a"])


def test_split_by_hand():
    # diag(5, 3, 1): the best rank-1 part is the 5, the residual keeps 3 and 1
    factor, up, residual = lowrank.split(torch.diag(torch.tensor([5.0, 3.0, 1.0])), 1)
    assert_close(up @ factor, torch.diag(torch.tensor([5.0, 0.0, 0.0])), "fp32_sum")
    assert_close(residual, torch.diag(torch.tensor([0.0, 3.0, 1.0])), "fp32_sum")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
def test_split_is_the_best_of_its_rank(shape):
    rank = 8
    w = layers.random(*shape, seed=1).double()
    factor, up, residual = lowrank.split(w, rank)
    assert factor.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
    assert_close(up @ factor + residual, w, "fp32_sum")
    assert_close(factor @ factor.T, torch.eye(rank, dtype=torch.float64), "fp32_sum")
    # Eckart-Young: what is left has exactly the norm of the singular values that were not taken
    assert_close(residual.norm(), torch.linalg.svdvals(w)[rank:].norm(), "fp32_sum")


def test_split_of_full_rank_leaves_nothing():
    w = layers.random(12, 12, seed=3)
    factor, up, _ = lowrank.split(w, 12)
    assert_close(up @ factor, w, "fp32_sum")


def test_split_of_rank_zero_leaves_the_weight():
    w = layers.random(4, 6, seed=2)
    factor, up, residual = lowrank.split(w, 0)
    assert factor.shape == (0, 6) and up.shape == (4, 0) and torch.equal(residual, w)


@pytest.mark.parametrize("rank", [-1, 5], ids=["negative", "above-full"])
def test_split_refuses_an_impossible_rank(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 0\.\.4 of a \(4, 6\) weight"):
        lowrank.split(torch.zeros(4, 6), rank)
