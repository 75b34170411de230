"""The CUDA product of modulation layers, emulated, against the reference."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, Kernels
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

SHAPES = {  # M, N, K
    "m=1-modulation": (1, 96, 192),
    "m=1-k=1088-two-panels": (1, 33, 1088),
    "m=3-of-four": (3, 40, 256),
    "m=8-full": (8, 32, 64),
    "m=17-three-blocks": (17, 5, 320),
    "n=1-one-output": (2, 1, 64),
    "m=0-empty": (0, 32, 64),
}


@pytest.mark.parametrize("dtype", layers.DTYPES.values(), ids=layers.DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES.values(), ids=SHAPES)
def test_gemv_awq(m, n, k, dtype):
    weights = layers.random_linear("awq", n, k, dtype=dtype)
    x = layers.random(m, k, seed=9, dtype=dtype)
    assert_close(Kernels(80).gemv(x, weights), reference.gemv_awq(x, weights), "fp32_sum")


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
def test_every_code_with_large_and_small_tokens(backwards):
    """Codes 0..15 at each of a word's eight places; tokens of 2^-20 and 2^20 side by side."""
    weights = layers.random_linear("awq", 16, 128, dtype=torch.float32)
    weights.codes[:] = torch.arange(64) * 17 + torch.arange(16).unsqueeze(1) * 5
    x = layers.random(2, 128, seed=2) * torch.tensor([[2.0**-20], [2.0**20]])
    got, want = Kernels(75, backwards).gemv(x, weights), reference.gemv_awq(x, weights)
    for token in range(2):
        assert_close(got[token], want[token], "fp32_sum")


def test_columns_of_a_wider_matrix_without_bias():
    weights = layers.random_linear("awq", 33, 192, dtype=torch.bfloat16)
    object.__setattr__(weights, "bias", None)
    x = layers.random(5, 400, seed=9, dtype=torch.bfloat16)[:, 7:199]
    assert_close(Kernels(90).gemv(x, weights), reference.gemv_awq(x, weights), "fp32_sum")
