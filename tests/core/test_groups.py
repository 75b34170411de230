from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import groups
from svdquant_nodes.tests import layers, oracle


def test_group_and_expand_by_hand():
    x = torch.arange(8.0).reshape(1, 8)
    assert groups.group(x, 4).tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert groups.expand(torch.tensor([[1.0, 2.0]]), 3).tolist() == [[1, 1, 1, 2, 2, 2]]


def test_group_refuses_a_rest():
    with pytest.raises(ValueError, match=r"last axis is 100, expected a multiple of 64\. Pad K"):
        groups.group(torch.zeros(1, 100), 64)


def test_act_scale_by_hand():
    # max|x| = 14 in group 0, an all-zero group 1; 14 * fp32(1/7) rounds to 2
    x = torch.zeros(1, 128)
    x[0, 3], x[0, 9] = -14.0, 13.0
    alpha = groups.act_scale(x, 64, 7)
    assert alpha.dtype == torch.float32 and alpha.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("q_max", [6, 7, 15], ids=["e2m1", "signed", "unsigned"])
def test_act_scale_multiplies_by_the_fp32_reciprocal(q_max):
    # a division would differ from this product in the last bit for a good part of the values
    x = layers.random(4000, 16, seed=q_max)
    absmax = oracle.values(x.abs().amax(-1, keepdim=True))
    want = oracle.round_to(absmax * oracle.round_to(1 / q_max, "fp32"), "fp32")
    got = oracle.values(groups.act_scale(x, 16, q_max))
    assert (got == want).all()
    assert (got != oracle.round_to(absmax / q_max, "fp32")).any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_act_scale_takes_16_bit_activations_exactly(dtype):
    x = layers.random(3, 128, seed=5, dtype=layers.DTYPES[dtype])
    assert torch.equal(groups.act_scale(x, 64, 7), groups.act_scale(x.float(), 64, 7))


def test_act_scale_of_no_tokens_and_of_nan():
    assert groups.act_scale(torch.zeros(0, 128), 64, 7).shape == (0, 2)
    x = torch.ones(1, 128)
    x[0, 0] = torch.nan
    alpha = groups.act_scale(x, 64, 7)
    assert alpha[0, 0].isnan() and alpha[0, 1].isfinite()


def test_weight_scale_is_one_only_for_zero_groups():
    w = torch.cat([torch.zeros(1, 64), torch.full((1, 64), -0.7)], dim=1)
    assert groups.weight_scale(w, 64, 7, torch.float32).tolist() == [[1.0, pytest.approx(0.1)]]


def test_weight_scale_that_underflows_its_dtype_is_one():
    # 7e-9 / 7 = 1e-9 is below half of fp16's smallest number: stored as 1, the group's codes become 0
    w = torch.full((1, 64), 7e-9)
    assert groups.weight_scale(w, 64, 7, torch.float16).tolist() == [[1.0]]
