"""W8A8 on an emulated Hopper card: whole layers against the reference, integer sums to the bit, every tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.core.weights import INT8, LinearWeights
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, EmulatedOps, KernelError
from svdquant_nodes.tests.kernels.emulated_hopper import ARCH, Hopper
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

SHAPES = {  # M, N, K, R
    "m=1-one-token": (1, 96, 128, 16),
    "m=17-tail": (17, 72, 208, 48),
    "m=130-two-rows-of-tiles": (130, 128, 128, 32),
    "m=260-three-rows-of-tiles": (260, 40, 144, 16),
    "n=1-one-output": (3, 1, 64, 16),
    "n=67-odd": (5, 67, 128, 32),
    "n=130-tile-192": (9, 130, 144, 32),
    "n=200-tile-256": (70, 200, 272, 32),
    "n=520-three-tiles": (20, 520, 128, 16),
    "k=16-part-of-a-step": (2, 40, 16, 0),
    "k=1680-stages-go-round": (3, 40, 1680, 0),
    "r=0-no-branch": (4, 64, 128, 0),
    "r=33-odd": (4, 64, 128, 33),
    "r=128-four-turns": (20, 64, 128, 128),
    "m=0-empty": (0, 64, 64, 16),
}
CLUSTERS = pytest.mark.parametrize("clusters", [False, True], ids=["alone", "pairs"])
DTYPE_NAMES = {torch.float32: "split_branch", torch.bfloat16: "bf16_output", torch.float16: "fp16_output"}


def inputs(m, n, k, r, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(5)
    codes, weight_codes = (
        torch.randint(-127, 128, (rows, k), generator=generator).to(torch.int8) for rows in (m, n)
    )
    scales, weight_scales = (torch.rand(rows, 1, generator=generator) * 0.01 + 0.001 for rows in (m, n))
    branch = dict(smooth=torch.ones(k), down=torch.zeros(r, k), up=layers.random(n, r, seed=7, dtype=dtype))
    bias = layers.random(n, seed=8, dtype=dtype)
    weights = LinearWeights(INT8, weight_codes, weight_scales, bias=bias, **branch)
    return codes, scales, layers.random(m, r, seed=6), weights


@CLUSTERS
@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES.values(), ids=SHAPES)
def test_gemm_int8(clusters, backwards, m, n, k, r):
    args = inputs(m, n, k, r)
    got = Hopper(backwards=backwards, sms=1, clusters=clusters).gemm_int8(*args)
    assert_close(got, reference.gemm_int8(*args), "split_branch")


@CLUSTERS
@pytest.mark.parametrize("sms", [1, 3, 132], ids="sms={}".format)
def test_blocks_take_tiles_in_turn(clusters, sms):
    args = inputs(260, 300, 272, 40)
    got = Hopper(sms=sms, clusters=clusters).gemm_int8(*args)
    assert_close(got, reference.gemm_int8(*args), "split_branch")


@CLUSTERS
@pytest.mark.parametrize("n", [90, 120, 180, 250], ids=["tile-96", "tile-128", "tile-192", "tile-256"])
def test_sums_to_the_bit(clusters, n):
    """Scales of 1 and no branch: the output is the sum of integers, with the largest that K = 1024 allows."""
    codes, _, _, weights = inputs(130, n, 1024, 0)
    codes[3], weights.codes[5], weights.codes[6] = 127, 127, -127
    weights = replace(weights, scales=torch.ones(n, 1), bias=None)
    got = Hopper(sms=1, clusters=clusters).gemm_int8(codes, torch.ones(130, 1), torch.zeros(130, 0), weights)
    assert torch.equal(got, (codes.long() @ weights.codes.long().T).float())


@pytest.mark.parametrize("weight_type", layers.DTYPES.values(), ids=[f"w-{name}" for name in layers.DTYPES])
@pytest.mark.parametrize("dtype", layers.DTYPES.values(), ids=layers.DTYPES)
def test_types(weight_type, dtype):
    """Every type of up and bias, and every type of output, at an odd N."""
    args = inputs(21, 67, 128, 40, weight_type)
    got = Hopper().gemm_int8(*args, dtype=dtype)
    assert got.dtype == dtype
    assert_close(got, reference.gemm_int8(*args), DTYPE_NAMES[dtype])


def test_fp16_output_saturates():
    codes, scales, hidden, weights = inputs(2, 64, 64, 16)
    got = Hopper().gemm_int8(codes, scales * 1e6, hidden, weights, dtype=torch.float16)
    assert got.abs().max() == 65504


def test_up_of_which_rows_lie_apart():
    codes, scales, hidden, weights = inputs(5, 64, 128, 16)
    wide = torch.full((64, 40), float("nan"), dtype=weights.up.dtype)
    wide[:, 3:19] = weights.up
    weights = replace(weights, up=wide[:, 3:19], bias=None)
    args = codes, scales, hidden, weights
    assert_close(Hopper().gemm_int8(*args), reference.gemm_int8(*args), "split_branch")


@pytest.mark.parametrize("spelling", ["wgmma_s8", "wgmma_s8_x2"])
@pytest.mark.parametrize("name", ["int8-of-int4", "int8-of-int4-unsigned"])
def test_layer(name, spelling):
    """Through the entry points, with the quantizer that every card has."""
    weights = layers.random_linear(name, 72, 192, 24)
    x = layers.random(19, 192, seed=8, dtype=torch.bfloat16)
    if name == "int8-of-int4-unsigned":
        x = torch.nn.functional.gelu(x.float(), approximate="tanh").bfloat16()
    got = linear.linear(x, weights, EmulatedOps(ARCH, spelling))
    assert_close(got, linear.linear(x, weights, reference), "split_branch")


def test_refusals():
    codes, scales, hidden, weights = inputs(2, 64, 64, 16)
    shifted = torch.zeros(1 + codes.numel(), dtype=torch.int8)[1:].view(2, 64)
    with pytest.raises(KernelError, match="multiple of 16 bytes"):
        Hopper().gemm_int8(shifted, scales, hidden, weights)
