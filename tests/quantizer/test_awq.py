"""Weight-only rounding: no group is worse than with its ends on the end codes, and the error told is the error made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdquant_nodes.svdquant.core import awq as decoder
from svdquant_nodes.svdquant.quantizer.awq import quantize_weight
from svdquant_nodes.tests import layers, oracle
from svdquant_nodes.tests.tolerances import assert_close

WEIGHTS = {
    "gaussian": lambda: layers.random(64, 512, seed=1, scale=0.03),
    "heavy-tailed": lambda: layers.random(64, 512, seed=1, scale=0.03) ** 3,
    "off-centre": lambda: layers.random(64, 512, seed=1, scale=0.03) + 0.2,
    "one-outlier": lambda: layers.random(64, 512, seed=1, scale=0.03) + torch.eye(64, 512) * 2,
}


def plain(w: torch.Tensor, size: int) -> np.ndarray:
    """Smallest value on 0, largest on 15, in float64 but for the stored scale and zero: squared error by group."""
    groups = oracle.values(w).reshape(len(w), -1, size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale, zero = oracle.round_to((high - low) / 15, "fp16"), oracle.round_to(low, "fp16")
    codes = np.clip(np.rint((groups - zero) / scale), 0, 15)
    return ((codes * scale + zero - groups) ** 2).sum(-1)


def of(weights, w: torch.Tensor, size: int) -> np.ndarray:
    """The same for what was made, by the oracle."""
    numbers = (oracle.values(weights.scales), oracle.values(weights.zeros))
    left = oracle.weight_awq(oracle.nibbles(weights.codes), *numbers) - oracle.values(w)
    return (left.reshape(len(w), -1, size) ** 2).sum(-1)


@pytest.mark.parametrize("size", [128, 64])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_group_is_worse_than_the_plain_choice(name, size):
    w = WEIGHTS[name]()
    weights, error = quantize_weight(w, size)
    ours, theirs = of(weights, w, size), plain(w, size)
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.97 * theirs.sum()
    assert error == pytest.approx((ours.sum() / np.square(oracle.values(w)).sum()) ** 0.5, rel=1e-4)


def test_gaussian_error():
    _, error = quantize_weight(layers.random(256, 4096, seed=2))
    assert error < 0.094


def test_all_sixteen_codes_are_used():
    weights, _ = quantize_weight(layers.random(64, 1024, seed=3))
    assert set(oracle.nibbles(weights.codes).flatten()) == set(range(16))


@pytest.mark.parametrize("value", [0.0, -0.4375, 3.0])
def test_groups_of_equal_values_are_exact(value):
    w = torch.full((4, 256), value)
    weights, error = quantize_weight(w)
    assert error == 0 and torch.equal(
        decoder.dequantize_weight(weights.codes, weights.scales, weights.zeros), w
    )


def test_the_grid_itself_is_found_again():
    """Weights that are code * scale + zero already, all codes used, come back as they were."""
    codes = torch.arange(256).remainder(16).repeat(8, 1).float()
    w = codes * 0.25 - 1.5
    weights, error = quantize_weight(w)
    assert error < 1e-6
    assert_close(decoder.dequantize_weight(weights.codes, weights.scales, weights.zeros), w, "fp32_sum")


def test_rows_do_not_depend_on_their_neighbours():
    w = layers.random(70, 4096, seed=4)  # more than one cache full
    whole, _ = quantize_weight(w)
    for row in (0, 31, 32, 69):
        alone, _ = quantize_weight(w[row : row + 1])
        assert torch.equal(alone.codes, whole.codes[row : row + 1])


BAD = {
    "nan": (torch.full((4, 128), torch.nan), "expected finite numbers, got NaN or infinity"),
    "infinity": (torch.full((4, 128), torch.inf), "expected finite numbers, got NaN or infinity"),
    "beyond-fp16": (torch.linspace(-1e7, 1e7, 512).reshape(4, 128), "expected values within torch.float16"),
}


@pytest.mark.parametrize(("w", "message"), BAD.values(), ids=BAD)
def test_refused(w, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(w)
