from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import smooth
from svdquant_nodes.tests import golden, layers, oracle
from svdquant_nodes.tests.tolerances import assert_close


@pytest.mark.parametrize(
    "file, prefix, vector",
    [
        ("svdq_int4_linear", "A", "c0"),
        ("svdq_int4_linear", "B", "c1"),
        ("svdq_nvfp4_linear", "C_f0", "f0"),
        ("svdq_nvfp4_linear", "C_f1", "f1"),
    ],
    ids=["int4-A", "int4-B-fc1", "nvfp4-tensor", "nvfp4-channel"],
)
def test_golden_smoothed_activations(file, prefix, vector):
    t = golden.case("forward", prefix)
    want = t.get("xs", t.get("fc1_xs"))
    assert torch.equal(smooth.smooth_act(t["x"], golden.tensors(file)[f"{vector}.logical.smooth"]), want)


def test_golden_smoothed_and_shifted_activations():
    t = golden.case("forward", "B")
    shifted = t["gelu"] + 0.171875
    vector = golden.tensors("svdq_int4_linear")["c3.logical.smooth"]
    assert torch.equal(smooth.smooth_act(shifted, vector), t["fc2_xs"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_smooth_act_rounds_once(dtype):
    x = layers.random(9, 64, seed=1, dtype=layers.DTYPES[dtype])
    s = layers.random(64, seed=2, dtype=layers.DTYPES[dtype]).abs() + 0.1
    got = smooth.smooth_act(x, s)
    assert got.dtype == x.dtype
    assert (oracle.values(got) == oracle.smooth_act(oracle.values(x), oracle.values(s), dtype)).all()


def test_smooth_keeps_its_own_range():
    """A bf16 vector may hold what fp16 activations cannot: 2^17 and 2^-30 are out of their range."""
    x = torch.tensor([[2.0, 2.0**-20]], dtype=torch.float16)
    s = torch.tensor([2.0**17, 2.0**-30], dtype=torch.bfloat16)
    assert smooth.smooth_act(x, s).tolist() == [[2.0**-16, 2.0**10]]


def test_smoothing_cancels_between_activation_and_weight():
    x, w = layers.random(5, 64, seed=3).double(), layers.random(7, 64, seed=4).double()
    s = torch.exp2(layers.random(64, seed=5)).double()
    assert_close((x / s) @ smooth.smooth_weight(w, s).T, x @ w.T, "fp32_sum")


def test_smoothing_vector_by_hand():
    # 16^.5 / 4^.5 = 2; alpha 1: 16; alpha 0: 1/4
    act, weight = torch.tensor([16.0]), torch.tensor([4.0])
    assert smooth.smoothing_vector(act, weight, 0.5).tolist() == [2.0]
    assert smooth.smoothing_vector(act, weight, 1.0).tolist() == [16.0]
    assert smooth.smoothing_vector(act, weight, 0.0).tolist() == [0.25]


def test_smoothing_vector_of_small_channels():
    # sqrt(1/4) / sqrt(1/16) = 2: a channel is dead at 0, not below 1
    assert smooth.smoothing_vector(torch.tensor([0.25]), torch.tensor([0.0625]), 0.5).tolist() == [2.0]


def test_smoothing_vector_is_one_for_dead_channels_and_nan():
    act = torch.tensor([0.0, 3.0, torch.nan, torch.inf, 1.0])
    weight = torch.tensor([2.0, 0.0, 1.0, 1.0, torch.nan])
    assert smooth.smoothing_vector(act, weight, 0.5).tolist() == [1, 1, 1, 1, 1]
