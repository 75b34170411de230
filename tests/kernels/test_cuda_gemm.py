"""The CUDA W4A4 products, emulated: whole layers against the reference, group sums to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdquant_nodes.svdquant.core import int4, reference
from svdquant_nodes.svdquant.core.weights import INT4, NVFP4, LinearWeights
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, KernelError, Kernels
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

SPELLINGS = {  # tensor cores, card
    "int4-sm80": ("int4", 80),
    "int4-sm75": ("int4", 75),
    "int8-sm90": ("int8", 90),
    "int8-sm75": ("int8", 75),
}
SHAPES = {  # M, N, K, R
    "m=1-one-token": (1, 128, 64, 16),
    "m=17-tail": (17, 72, 192, 40),
    "n=1-one-output": (3, 1, 64, 16),
    "n=65-odd": (5, 65, 128, 16),
    "k=64-one-group": (4, 64, 64, 0),
    "k=512-scales-come-twice": (2, 64, 512, 16),
    "m=130-n=130-blocks": (130, 130, 128, 16),
    "m=0-empty": (0, 64, 64, 16),
}


def layer_inputs(kind, m, n, k, r, dtype=torch.bfloat16):
    weights = layers.random_linear(kind, n, k, r, dtype=dtype, seed=3)
    high = 16 if kind == "int4-unsigned" else 8
    low = 0 if kind == "int4-unsigned" else -8
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(low, high, (m, k), generator=generator).to(torch.uint8 if low == 0 else torch.int8)
    scales = (torch.rand(m, k // weights.spec.group, generator=generator) + 0.1).to(dtype)
    return codes, scales, layers.random(m, r, seed=6), weights


@pytest.mark.parametrize(("product", "arch"), SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("kind", ["int4", "int4-unsigned"])
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES.values(), ids=SHAPES)
def test_gemm_int4(product, arch, kind, m, n, k, r):
    args = layer_inputs(kind, m, n, k, r)
    assert_close(Kernels(arch).gemm(product, kind, *args), reference.gemm_int4(*args), "split_branch")


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize(("product", "arch"), SPELLINGS.values(), ids=SPELLINGS)
def test_large_tile(product, arch, backwards):
    """Two rows of 32 blocks and a tail: what large outputs run, from k too short for the pipeline to fill."""
    args = layer_inputs("int4", 130, 2052, 64, 16)
    got = Kernels(arch, backwards).gemm(product, "int4", *args)
    assert_close(got, reference.gemm_int4(*args), "split_branch")


@pytest.mark.parametrize(("product", "arch"), SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 9], ids="groups={}".format)
def test_group_sums_to_the_bit(product, arch, groups):
    """Scales of 1 and no branch: the output is the sum of integers, exact in fp32, with codes down to -8."""
    n, k = 72, 64 * groups
    packed = int4.pack_nibbles(torch.randint(-8, 8, (n, k)))
    packed[0] = 0x88  # all -8
    codes = torch.randint(-8, 8, (20, k)).to(torch.int8)
    codes[3] = -8
    ones, empty = torch.ones(n, groups), torch.zeros(n, 0)
    weights = LinearWeights(INT4, packed, ones, smooth=torch.ones(k), down=torch.zeros(0, k), up=empty)
    got = Kernels(arch).gemm(product, "int4", codes, torch.ones(20, groups), torch.zeros(20, 0), weights)
    assert torch.equal(got, (codes.long() @ int4.unpack_signed(packed).long().T).float())


def test_activations_of_eight_bits():
    codes, scales, hidden, weights = layer_inputs("int4", 20, 72, 192, 16)
    codes = torch.randint(-127, 128, codes.shape).to(torch.int8)
    codes[0], weights.codes[0] = 127, 0x88  # the largest sum there is
    args = codes, scales, hidden, weights
    assert_close(Kernels(90).gemm("int8", "int4", *args), reference.gemm_int4(*args), "split_branch")


@pytest.mark.parametrize("arch", [75, 90], ids=["sm75", "sm90"])
@pytest.mark.parametrize("weight_type", layers.DTYPES.values(), ids=[f"w-{name}" for name in layers.DTYPES])
@pytest.mark.parametrize("dtype", layers.DTYPES.values(), ids=layers.DTYPES)
def test_types(arch, weight_type, dtype):
    """Every type of up, bias and scales, and every type of output, at an odd N."""
    args = layer_inputs("int4", 5, 67, 128, 24, weight_type)
    got = Kernels(arch).gemm("int8", "int4", *args, dtype=dtype)
    name = {torch.float32: "split_branch", torch.bfloat16: "bf16_output", torch.float16: "fp16_output"}[dtype]
    assert got.dtype == dtype
    assert_close(got, reference.gemm_int4(*args), name)


def test_fp16_output_saturates():
    codes, scales, hidden, weights = layer_inputs("int4", 2, 64, 64, 16)
    got = Kernels(90).gemm("int8", "int4", codes, scales * 1e6, hidden, weights, dtype=torch.float16)
    assert got.abs().max() == 65504


def test_without_bias_and_scales_apart():
    codes, scales, hidden, weights = layer_inputs("int4", 5, 64, 192, 16)
    weights = replace(weights, bias=None)
    wide = torch.full((5, 7), float("nan"), dtype=scales.dtype)
    wide[:, 2:5] = scales
    args = codes, wide[:, 2:5], hidden, weights
    assert_close(Kernels(90).gemm("int8", "int4", *args), reference.gemm_int4(*args), "split_branch")


def test_refusals():
    codes, scales, hidden, weights = layer_inputs("int4", 2, 64, 64, 16)
    with pytest.raises(KernelError, match="no 4-bit tensor cores"):
        Kernels(90).gemm("int4", "int4", codes, scales, hidden, weights)
    shifted = torch.zeros(1 + codes.numel(), dtype=torch.int8)[1:].view(2, 64)
    with pytest.raises(KernelError, match="multiple of 16 bytes"):
        Kernels(90).gemm("int8", "int4", shifted, scales, hidden, weights)


# ---- NVFP4 ----

NVFP4_SPELLINGS = {  # product, card
    "f16-sm75": ("nvfp4", 75),
    "f16-sm80": ("nvfp4", 80),
    "mxf4-sm120": ("mxf4", 120),
}
NVFP4_SHAPES = {  # M, N, K, R
    "m=1-one-token": (1, 64, 64, 16),
    "m=17-tail": (17, 72, 192, 40),
    "k=16-one-group": (3, 33, 16, 16),
    "k=208-part-of-a-step": (5, 65, 208, 0),
    "k=512-scales-as-words": (20, 65, 512, 16),
    "m=130-n=2052-large-tile": (130, 2052, 80, 16),
    "m=0-empty": (0, 64, 64, 16),
}


def nvfp4_inputs(m, n, k, r, dtype=torch.bfloat16):
    weights = layers.random_linear("nvfp4", n, k, r, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (m, k), generator=generator).to(torch.uint8)
    scales = torch.exp2(torch.randint(-10, 9, (m, k // 16), generator=generator)) * 1.125
    return codes, scales.clamp(max=448).to(torch.float8_e4m3fn), layers.random(m, r, seed=6), weights


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize(("product", "arch"), NVFP4_SPELLINGS.values(), ids=NVFP4_SPELLINGS)
@pytest.mark.parametrize(("m", "n", "k", "r"), NVFP4_SHAPES.values(), ids=NVFP4_SHAPES)
def test_gemm_nvfp4(product, arch, backwards, m, n, k, r):
    args = nvfp4_inputs(m, n, k, r)
    got = Kernels(arch, backwards).gemm(product, "nvfp4", *args)
    assert_close(got, reference.gemm_nvfp4(*args), "split_branch")


@pytest.mark.parametrize(("product", "arch"), NVFP4_SPELLINGS.values(), ids=NVFP4_SPELLINGS)
def test_nvfp4_operands_are_exact(product, arch):
    """Every code at every scale, both sides: one product at a time, which no rounding may touch."""
    scales = torch.arange(127, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)  # all but NaN
    codes = torch.zeros(127, 16, dtype=torch.uint8)
    codes[:, 5] = torch.arange(127) % 16
    packed = int4.pack_nibbles(torch.arange(127).unsqueeze(1).expand(-1, 16) // 8)
    empty = torch.zeros(127, 0)
    weights = LinearWeights(
        NVFP4,
        packed,
        scales[:, None],
        torch.ones(1),
        smooth=torch.ones(16),
        down=empty[:0].T.reshape(0, 16),
        up=empty,
    )
    args = codes, scales[:, None], empty, weights
    assert torch.equal(Kernels(arch).gemm(product, "nvfp4", *args), reference.gemm_nvfp4(*args))


@pytest.mark.parametrize(("product", "arch"), NVFP4_SPELLINGS.values(), ids=NVFP4_SPELLINGS)
def test_every_column_meets_its_own_scale(product, arch):
    """One code a row, each at another column, under scales that are all different: 128 columns and their tail."""
    k = 144
    codes, packed = torch.eye(k).to(torch.uint8) * 2, int4.pack_nibbles(torch.full((9, k), 2))  # ones
    scales = torch.arange(8, 8 + k // 16).to(torch.uint8).expand(k, -1).contiguous().view(torch.float8_e4m3fn)
    theirs = (
        torch.arange(40, 40 + k // 16).to(torch.uint8).expand(9, -1).contiguous().view(torch.float8_e4m3fn)
    )
    weights = LinearWeights(
        NVFP4,
        packed,
        theirs,
        torch.ones(1),
        smooth=torch.ones(k),
        down=torch.zeros(0, k),
        up=torch.zeros(9, 0),
    )
    got = Kernels(arch).gemm(product, "nvfp4", codes, scales, torch.zeros(k, 0), weights)
    group = torch.arange(k) // 16
    assert torch.equal(got, (scales.float() * theirs[:1].float())[:, group].diagonal()[:, None].expand(-1, 9))


@pytest.mark.parametrize(("product", "arch"), NVFP4_SPELLINGS.values(), ids=NVFP4_SPELLINGS)
def test_nvfp4_scales_that_are_no_numbers(product, arch):
    """A scale of -0 is 0, and one of NaN spoils its row alone."""
    codes, scales, hidden, weights = nvfp4_inputs(5, 33, 80, 16)
    scales.view(torch.uint8)[0], scales.view(torch.uint8)[1, 4] = 0x80, 0x7F
    args = codes, scales, hidden, weights
    got, want = Kernels(arch).gemm(product, "nvfp4", *args), reference.gemm_nvfp4(*args)
    assert got[1].isnan().all() and not got[[0, 2, 3, 4]].isnan().any()
    assert_close(got[[0, 2, 3, 4]], want[[0, 2, 3, 4]], "split_branch")


@pytest.mark.parametrize(("product", "arch"), NVFP4_SPELLINGS.values(), ids=NVFP4_SPELLINGS)
def test_nvfp4_negative_scales_of_weights(product, arch):
    """No packer is known to write them, and nothing in the format forbids them."""
    codes, scales, hidden, weights = nvfp4_inputs(5, 33, 208, 16)
    weights.scales.view(torch.uint8)[::2, ::3] |= 0x80
    weights.scales.view(torch.uint8)[1::2, 1::2] |= 0x80
    args = codes, scales, hidden, weights
    assert_close(Kernels(arch).gemm(product, "nvfp4", *args), reference.gemm_nvfp4(*args), "split_branch")


def test_mxf4_is_refused_elsewhere():
    with pytest.raises(KernelError, match="no products of 4-bit floats"):
        Kernels(80).gemm("mxf4", "nvfp4", *nvfp4_inputs(2, 64, 64, 16))


@pytest.mark.parametrize(("product", "arch"), NVFP4_SPELLINGS.values(), ids=NVFP4_SPELLINGS)
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor-scale", "row-scale"])
def test_nvfp4_second_scale(per_row, product, arch):
    codes, scales, hidden, weights = nvfp4_inputs(3, 40, 64, 16)
    if per_row:
        weights = replace(weights, second_scale=torch.rand(40, dtype=torch.float32) + 0.5)
    args = codes, scales, hidden, weights
    got = Kernels(arch).gemm(product, "nvfp4", *args, dtype=torch.bfloat16)
    assert_close(got, reference.gemm_nvfp4(*args), "bf16_output")
