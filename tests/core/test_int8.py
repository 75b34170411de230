from __future__ import annotations

import numpy as np
import pytest
import torch

from svdquant_nodes.svdquant.core import int8, linear, reference
from svdquant_nodes.tests import layers, oracle
from svdquant_nodes.tests.tolerances import assert_close, distance

STORED = list(layers.EIGHT_BITS.values())


def codes(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


# ---- weights ----


def test_quantize_weight_by_hand():
    # absmax 254 -> scale 2; -254/2 = -127; ties to even: 1/2 -> 0, 3/2 -> 2; a zero row has scale 1
    w = torch.zeros(2, 48)
    w[0, :4] = torch.tensor([254.0, -254, 1, 3])
    got, scales = int8.quantize_weight(w)
    assert got.dtype == torch.int8 and got[0, :5].tolist() == [127, -127, 0, 2, 0]
    assert scales.dtype == torch.float32 and scales.tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize("magnitude", [1e-38, 1.0, 1e38], ids=["subnormal-scale", "usual", "near-overflow"])
def test_largest_weight_has_the_largest_code(magnitude):
    w = layers.random(6, 192, seed=1).clamp(-3, 3)
    w = w / w.abs().amax(-1, keepdim=True) * magnitude
    got, scales = int8.quantize_weight(w)
    assert got.abs().amax(-1).tolist() == [127] * 6
    assert_close(int8.dequantize_weight(got, scales) / magnitude, w / magnitude, "int8_weight")


@pytest.mark.parametrize("name", layers.EIGHT_BITS)
def test_requantized_layer_agrees_with_the_oracle(name):
    """Scales by definition, and no code further than half a step (and an ulp) from the 4-bit weight."""
    stored = layers.random_linear(layers.EIGHT_BITS[name], 40, 192, 8)
    w, truth = int8.requantize(stored), layers.main_weight(stored)
    scales = oracle.round_to(np.abs(truth).max(1, keepdims=True) * oracle.round_to(1 / 127, "fp32"), "fp32")
    assert_close(w.scales, scales, "fp32_sum")
    assert np.abs(oracle.values(w.codes) - truth / oracle.values(w.scales)).max() < 0.5001


@pytest.mark.parametrize("name", layers.EIGHT_BITS)
def test_requantizing_keeps_the_rest_of_the_layer(name):
    stored = layers.random_linear(layers.EIGHT_BITS[name], 40, 192, 8)
    w = int8.requantize(stored)
    assert w.spec.act_shift == stored.spec.act_shift
    assert all(getattr(w, field) is getattr(stored, field) for field in ("smooth", "down", "up", "bias"))
    assert w.codes.nbytes == 2 * stored.codes.nbytes


@pytest.mark.parametrize("name", ["awq", "int8-of-int4"])
def test_other_formats_are_refused(name):
    with pytest.raises(ValueError, match=f"expected int4 or nvfp4 weights, got {name.partition('-')[0]}"):
        int8.requantize(layers.random_linear(name, 16, 64))


# ---- products ----


@pytest.mark.parametrize("k", [16, 1024, 1040, 12288], ids="k={}".format)
def test_integer_sums_are_exact(k):
    a, b = codes(3, k, seed=1), codes(5, k, seed=2)
    a[0], b[0], b[1] = 127, 127, -127  # the largest sums there are
    want = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    assert (int8.integer_matmul(a, b).numpy() == want).all() and want[0, 0] == k * 127 * 127


# ---- what it is for ----


@pytest.mark.parametrize("name", layers.EIGHT_BITS)
def test_closer_to_the_16_bit_layer_than_four_bits(name):
    """Against the stored weight with activations as they are, and against a 16-bit weight that was rounded to it."""
    stored = layers.random_linear(layers.EIGHT_BITS[name], 128, 1024, 16)
    x = layers.random(32, 1024, seed=7)
    if stored.spec.act_shift:
        x = torch.nn.functional.gelu(x)
    x = x.to(torch.bfloat16)
    plain = oracle.values(stored.bias.float() + reference.shift_compensation(stored))
    truth = oracle.values(x) @ layers.dense(stored).T + plain
    four, eight = (linear.linear(x, w, reference) for w in (stored, int8.requantize(stored)))
    assert distance(eight, truth).norm < distance(four, truth).norm / 3
    assert_close(eight, truth, "int8_layer")
