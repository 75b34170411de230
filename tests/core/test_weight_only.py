"""The op set without activation quantization equals the dequantized weight, and is closer to the truth than W4A4."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.functional import gelu

from svdquant_nodes.svdquant.core import linear, reference, weight_only
from svdquant_nodes.tests import layers, oracle
from svdquant_nodes.tests.tolerances import assert_close, distance

OPS = [name for name in vars(reference) if name.startswith(("quantize_", "gemm_", "gemv_"))]


def dense(x, w):
    """The layer in float64 with exact activations; unsigned layers see x + shift on the 4-bit part."""
    values = oracle.values(x)
    if w.spec.format == "awq":
        return values @ layers.dense(w).T + oracle.values(w.bias)
    residual = layers.main_weight(w) / oracle.values(w.smooth)
    branch = values @ oracle.values(w.down).T @ oracle.values(w.up).T
    return (values + w.spec.act_shift) @ residual.T + branch + oracle.values(w.bias)


@pytest.mark.parametrize("name", [*layers.FORMATS, *layers.EIGHT_BITS])
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", "fp32_sum"), ("bf16", "weight_only_bf16")])
def test_equals_the_dequantized_layer(name, dtype, limit):
    w = layers.random_linear(name, 96, 256, 16)
    x = layers.random(17, 256, seed=9).clamp(min=-0.17).to(layers.DTYPES[dtype])
    assert_close(linear.linear(x, w, weight_only), dense(x, w), limit)


@pytest.mark.parametrize("name", ["int4", "int4-unsigned", "nvfp4"])
def test_is_more_accurate_than_quantized_activations(name):
    w = layers.random_linear(name, 96, 256, 16)
    x = layers.random(17, 256, seed=9).clamp(min=-0.17).to(torch.bfloat16)
    truth = dense(x, w)
    errors = [distance(linear.linear(x, w, ops), truth).norm for ops in (weight_only, reference)]
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize("second", ["int4", "int4-unsigned", "nvfp4"])
def test_a_gelu_between_two_layers(second):
    w, following = (
        layers.random_linear(second.removesuffix("-unsigned"), 128, 64, 16),
        layers.random_linear(second, 64, 128, 16, seed=2),
    )
    x = layers.random(5, 64, seed=9)
    got = linear.feed_forward(x, w, following, weight_only)
    between = gelu(torch.from_numpy(dense(x, w)), approximate="tanh")
    assert_close(got, dense(between, following), "fp32_sum")


@pytest.mark.parametrize("op", OPS)
def test_same_names_and_arguments_as_the_reference(op):
    ours, theirs = (inspect.signature(getattr(ops, op)).parameters for ops in (weight_only, reference))
    assert len(ours) == len(theirs)


def test_no_tokens():
    w = layers.random_linear("int4", 64, 64, 16)
    assert linear.linear(torch.empty(0, 64), w, weight_only).shape == (0, 64)
