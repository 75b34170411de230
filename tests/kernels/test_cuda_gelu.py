"""The CUDA product with GELU and the next layer's quantizer, emulated: the same bits as the three apart."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, KernelError, Kernels, library
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

SPELLINGS = {  # tensor cores, card
    "int4-sm80": ("int4", 80),
    "int4-sm75": ("int4", 75),
    "int8-sm120": ("int8", 120),
    "int8-sm75": ("int8", 75),
    "nvfp4-sm80": ("nvfp4", 80),
    "nvfp4-sm75": ("nvfp4", 75),
    "mxf4-sm120": ("mxf4", 120),
}
FLOATS = ("nvfp4", "mxf4")
SHAPES = {  # M, N, K, R, R of the next layer
    "m=1-one-token": (1, 64, 64, 16, 16),
    "m=17-tail": (17, 128, 192, 40, 24),
    "m=66-two-rows-of-tiles": (66, 128, 64, 16, 8),
    "n=320-five-groups": (5, 320, 128, 16, 32),
    "r=0-no-branches": (4, 128, 64, 0, 0),
    "r=5-odd": (3, 64, 128, 5, 5),
    "r=72-three-chunks-of-ranks": (18, 128, 64, 8, 72),
    "m=0-empty": (0, 64, 64, 16, 16),
}


def usual(product):
    """The layer that follows one of a product."""
    return "nvfp4" if product in FLOATS else "int4-unsigned"


def pair(m, n, k, r, after, dtype, following="int4-unsigned"):
    """Inputs of the product, its layer, and the layer that follows."""
    first = layers.random_linear(following.removesuffix("-unsigned"), n, k, r, dtype=dtype, seed=3)
    then = layers.random_linear(following, 40, n, after, dtype=dtype, seed=8)
    x = layers.random(m, k, seed=1, dtype=dtype)
    return *linear.quantize(x, first, reference), first, then


def apart(kernels, product, codes, scales, hidden, first, then, dtype):
    """The same by three kernels: product, torch's GELU, quantizer."""
    kind = first.spec.format
    x = gelu(kernels.gemm(product, kind, codes, scales, hidden, first, dtype=dtype), approximate="tanh")
    kind = "int4-unsigned" if then.spec.act_shift else kind
    return kernels.quantize(kind, x, then.smooth, then.down, shift=then.spec.act_shift)


def one_zero(codes):
    """Codes of e2m1 with both zeros alike: below -5 torch's tanh is -1 before the C library's, and x in fp16 then -0
    instead of -2^-22."""
    return torch.where(codes == 8, 0, codes)


def check(got, want, zeros_alike=False):
    codes = [one_zero(made[0]) if zeros_alike else made[0] for made in (got, want)]
    assert got[0].dtype == want[0].dtype and torch.equal(*codes), "codes"
    assert got[1].dtype == want[1].dtype and torch.equal(got[1], want[1]), "scales"
    assert_close(got[2], want[2], "fp32_sum")


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize(("product", "arch"), SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_together_and_apart(product, arch, shape, backwards):
    dtype = torch.float16 if arch < 80 else torch.bfloat16
    args, kernels = pair(*shape, dtype, usual(product)), Kernels(arch, backwards)
    got = kernels.gemm_gelu(product, *args, dtype=dtype)
    zeros_alike = product in FLOATS and dtype == torch.float16
    check(got, apart(kernels, product, *args, dtype), zeros_alike)


@pytest.mark.parametrize(
    ("product", "arch"), [("int4", 80), ("int8", 80), ("nvfp4", 80), ("mxf4", 120)], ids=str
)
def test_large_tile(product, arch):
    """Two rows of 33 blocks and a tail: what large outputs run."""
    args, kernels = pair(130, 2112, 64, 16, 8, torch.bfloat16, usual(product)), Kernels(arch)
    check(kernels.gemm_gelu(product, *args), apart(kernels, product, *args, torch.bfloat16))


@pytest.mark.parametrize("product", ["int8", "nvfp4"])
@pytest.mark.parametrize("walk", [1, 2, 3, 5, 9], ids="walk={}".format)
def test_tiles_of_one_block(walk, product):
    """However the five tiles of a row are shared out; the last block may have fewer, or there is but one."""
    args, kernels = pair(70, 320, 128, 16, 40, torch.bfloat16, usual(product)), Kernels(80)
    check(kernels.gemm_gelu(product, *args, walk=walk), apart(kernels, product, *args, torch.bfloat16))


WALKS = {  # rows of tiles, tiles in a row, tiles a block
    "flux-text": (4, 192, 1),
    "flux-image": (32, 192, 4),
    "pixart": (64, 72, 3),
    "a-large-picture": (128, 192, 16),
    "one-tile": (1, 1, 1),
}


@pytest.mark.parametrize(("rows", "tiles", "walk"), WALKS.values(), ids=WALKS)
def test_how_many_tiles_a_block_takes(rows, tiles, walk):
    assert library(80).tiles_a_walk(ctypes.c_int64(rows), ctypes.c_int64(tiles)) == walk


@pytest.mark.parametrize("following", ["int4", "int4-unsigned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_types(dtype, following):
    """Signed codes for a layer without a shift, and a first layer whose factors have 32 bits."""
    codes, scales, hidden, first, then = pair(5, 128, 128, 24, 16, dtype, following)
    wide = {name: getattr(first, name).float() for name in ("scales", "up", "bias")}
    args = codes, scales.float(), hidden, replace(first, **wide), replace(then, smooth=then.smooth.float())
    kernels = Kernels(80)
    check(kernels.gemm_gelu("int4", *args, dtype=dtype), apart(kernels, "int4", *args, dtype))


PRODUCTS = {"int8": ("int8", 90), "nvfp4": ("nvfp4", 90), "mxf4": ("mxf4", 120)}
each_product = pytest.mark.parametrize(("product", "arch"), PRODUCTS.values(), ids=PRODUCTS)


@each_product
def test_without_bias(product, arch):
    codes, scales, hidden, first, then = pair(5, 64, 64, 8, 8, torch.bfloat16, usual(product))
    args, kernels = (codes, scales, hidden, replace(first, bias=None), then), Kernels(arch)
    check(kernels.gemm_gelu(product, *args), apart(kernels, product, *args, torch.bfloat16))


FACTORS = {  # of NVFP4: K, second scale
    "part-of-a-step": (80, lambda second, n: second),
    "scales-in-no-words": (48, lambda second, n: second),
    "a-second-scale-a-row": (64, lambda second, n: second * (torch.rand(n) + 0.5)),
    "in-fp32": (64, lambda second, n: second.float()),
}


@pytest.mark.parametrize(("k", "second"), FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize(("product", "arch"), [("nvfp4", 80), ("mxf4", 120)], ids=str)
def test_factors_of_nvfp4(product, arch, k, second):
    """The second scale belongs to the first layer's weight; activations have none, and the next layer's is not read."""
    codes, scales, hidden, first, then = pair(5, 128, k, 8, 8, torch.bfloat16, "nvfp4")
    first = replace(first, second_scale=second(first.second_scale, 128))
    then = replace(then, second_scale=torch.full((1,), torch.nan))
    args, kernels = (codes, scales, hidden, first, then), Kernels(arch)
    check(kernels.gemm_gelu(product, *args), apart(kernels, product, *args, torch.bfloat16))


@each_product
def test_numbers_that_fp16_does_not_hold(product, arch):
    """What saturates before the GELU is 65504 behind it, or zero."""
    codes, scales, hidden, first, then = pair(4, 64, 64, 8, 8, torch.float16, usual(product))
    if product in FLOATS:
        first = replace(first, second_scale=first.second_scale.float() * 1e6)
    else:
        scales = scales.float() * 1e6
    then = replace(then, smooth=torch.ones(64))
    args, kernels = (codes, scales, hidden, first, then), Kernels(arch)
    got = kernels.gemm_gelu(product, *args, dtype=torch.float16)
    check(got, apart(kernels, product, *args, torch.float16))
    assert got[1].float().isfinite().all() and got[2].abs().max() > 65504


@each_product
def test_nan_reaches_the_scale(product, arch):
    codes, scales, hidden, first, then = pair(3, 128, 64, 8, 8, torch.bfloat16, usual(product))
    hidden[1] = float("nan")
    made = Kernels(arch).gemm_gelu(product, codes, scales, hidden, first, then)[1].float()
    assert made[[0, 2]].isfinite().all() and made[1].isnan().all()


def test_refusals():
    codes, scales, hidden, first, then = pair(2, 64, 64, 8, 8, torch.bfloat16)
    args = codes, scales, hidden, first
    with pytest.raises(KernelError, match="no 4-bit tensor cores"):
        Kernels(90).gemm_gelu("int4", *args, then)
    with pytest.raises(KernelError, match="activations must be fp16"):
        Kernels(75).gemm_gelu("int4", *args, then)
    with pytest.raises(KernelError, match="activations must be fp16"):
        Kernels(80).gemm_gelu("int4", *args, then, dtype=torch.float32)
    with pytest.raises(KernelError, match="down must be of the activations' type"):
        Kernels(80).gemm_gelu("int4", *args, replace(then, down=then.down.float()))
    with pytest.raises(KernelError, match="codes must be signed"):
        Kernels(80).gemm_gelu("int4", codes.to(torch.uint8), scales, hidden, first, then)
    floats = pair(2, 80, 64, 8, 8, torch.bfloat16, "nvfp4")
    with pytest.raises(KernelError, match="N must be a multiple of 64"):
        Kernels(120).gemm_gelu("mxf4", *floats)
    with pytest.raises(KernelError, match="no products of 4-bit floats"):
        Kernels(90).gemm_gelu("mxf4", *floats)
