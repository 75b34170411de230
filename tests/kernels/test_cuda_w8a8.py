"""The CUDA W8A8 product, emulated: whole layers against the reference, sums of integers to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.core.weights import INT8, LinearWeights
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, KernelError, Kernels
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

CARDS = {"sm75": 75, "sm80": 80, "sm90": 90}
ORDERS = {"in-order": False, "backwards": True}
SHAPES = {  # M, N, K, R
    "m=1-one-token": (1, 128, 64, 16),
    "m=17-tail": (17, 72, 192, 40),
    "n=1-one-output": (3, 1, 64, 16),
    "n=65-odd": (5, 65, 128, 16),
    "k=16-part-of-a-step": (4, 64, 16, 0),
    "k=208-tail": (4, 64, 208, 16),
    "k=1024-more-than-the-pipeline": (2, 64, 1024, 16),
    "m=130-n=130-blocks": (130, 130, 128, 16),
    "m=0-empty": (0, 64, 64, 16),
}
LARGE = (130, 8068, 80, 16)  # two rows of 64 blocks, tails in M, N and K


def codes_of(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)


def layer_inputs(m, n, k, r, dtype=torch.bfloat16):
    """Codes, scales, hidden values and a layer of any K that is a multiple of 16."""
    weights = layers.random_linear("int8-of-nvfp4", n, k, r, dtype=dtype, seed=3)
    scales = torch.rand(m, 1, generator=torch.Generator().manual_seed(5)) * 0.02 + 0.01
    return codes_of(m, k, seed=6), scales, layers.random(m, r, seed=7), weights


@pytest.mark.parametrize("arch", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gemm(arch, shape):
    args = layer_inputs(*shape)
    assert_close(Kernels(arch).gemm_int8(*args), reference.gemm_int8(*args), "split_branch")


@pytest.mark.parametrize("backwards", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("arch", CARDS.values(), ids=CARDS)
def test_large_tile(arch, backwards):
    args = layer_inputs(*LARGE)
    got = Kernels(arch, backwards).gemm_int8(*args)
    assert_close(got, reference.gemm_int8(*args), "split_branch")


@pytest.mark.parametrize("arch", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("k", [64, 80, 320, 2048], ids="k={}".format)
def test_sums_are_those_of_the_reference_to_the_bit(arch, k):
    """Without a branch there is nothing to add in another order: an integer, two products, one sum."""
    codes, scales, _, weights = layer_inputs(20, 72, k, 0)
    codes[0], weights.codes[0], weights.codes[1] = 127, 127, -127  # the largest sums there are
    args = codes, scales, torch.zeros(20, 0), weights
    assert torch.equal(Kernels(arch).gemm_int8(*args), reference.gemm_int8(*args))


def test_every_product_of_two_codes():
    """One column at a time, so that each sum is one product: all 255 codes against all 255."""
    values = torch.arange(-127, 128).to(torch.int8)
    codes, weight_codes = torch.zeros(255, 64, dtype=torch.int8), torch.zeros(255, 64, dtype=torch.int8)
    codes[:, 37], weight_codes[:, 37] = values, values
    none = dict(smooth=torch.ones(64), down=torch.zeros(0, 64), up=torch.zeros(255, 0))
    weights = LinearWeights(INT8, weight_codes, torch.ones(255, 1), **none)
    got = Kernels(80).gemm_int8(codes, torch.ones(255, 1), torch.zeros(255, 0), weights)
    assert torch.equal(got, values.float().outer(values.float()))


@pytest.mark.parametrize("arch", [75, 90], ids=["sm75", "sm90"])
@pytest.mark.parametrize("weight_type", layers.DTYPES.values(), ids=[f"w-{name}" for name in layers.DTYPES])
@pytest.mark.parametrize("dtype", layers.DTYPES.values(), ids=layers.DTYPES)
def test_types(arch, weight_type, dtype):
    """Every type of up and bias, and every type of output, at an odd N."""
    args = layer_inputs(5, 67, 128, 24, weight_type)
    got = Kernels(arch).gemm_int8(*args, dtype=dtype)
    name = {torch.float32: "split_branch", torch.bfloat16: "bf16_output", torch.float16: "fp16_output"}[dtype]
    assert got.dtype == dtype
    assert_close(got, reference.gemm_int8(*args), name)


def test_without_bias():
    codes, scales, hidden, weights = layer_inputs(5, 64, 192, 16)
    args = codes, scales, hidden, replace(weights, bias=None)
    assert_close(Kernels(90).gemm_int8(*args), reference.gemm_int8(*args), "split_branch")


def test_nan_stays_with_its_token():
    codes, scales, hidden, weights = layer_inputs(20, 72, 128, 16)
    scales[7] = float("nan")
    got = Kernels(80).gemm_int8(codes, scales, hidden, weights)
    assert got[7].isnan().all() and got[[*range(7), *range(8, 20)]].isfinite().all()


def test_fp16_output_saturates():
    codes, scales, hidden, weights = layer_inputs(2, 64, 64, 16)
    got = Kernels(90).gemm_int8(codes, scales * 1e7, hidden, weights, dtype=torch.float16)
    assert got.abs().max() == 65504


def test_refusals():
    codes, scales, hidden, weights = layer_inputs(2, 64, 64, 16)
    shifted = torch.zeros(1 + codes.numel(), dtype=torch.int8)[1:].view(2, 64)
    with pytest.raises(KernelError, match="codes must begin at a multiple of 16 bytes"):
        Kernels(90).gemm_int8(shifted, scales, hidden, weights)
    narrow = layers.random_linear("int8-of-int4", 16, 64, 0)
    narrow = replace(
        narrow, codes=narrow.codes[:, :24].contiguous(), smooth=torch.ones(24), down=torch.zeros(0, 24)
    )
    with pytest.raises(KernelError, match="K must be a multiple of 16"):
        Kernels(90).gemm_int8(codes[:, :24].contiguous(), scales, torch.zeros(2, 0), narrow)
