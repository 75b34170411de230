"""The CUDA quantizers, emulated: codes and scales to the bit, hidden values as fp32 sums."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.core.weights import GELU_SHIFT
from svdquant_nodes.svdquant.kernels import carrier
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, KernelError, Kernels
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

KINDS = ["int4", "int4-unsigned", "nvfp4", "int8", "int8-unsigned", "e4m3", "e4m3-unsigned"]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {  # M, K, R
    "m=1-one-token": (1, 64, 16),
    "m=17-tail": (17, 192, 40),
    "m=130-blocks": (130, 128, 16),
    "k=512-one-chunk-a-warp": (3, 512, 32),
    "k=576-warps-uneven": (2, 576, 8),
    "r=0-no-branch": (5, 128, 0),
    "r=160-two-chunks-of-ranks": (2, 64, 160),
    "m=0-empty": (0, 64, 16),
}


def inputs(kind, m, k, r, dtype):
    x = layers.random(m, k, seed=1, dtype=dtype)
    if kind.endswith("unsigned"):
        x = torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    smooth = (layers.random(k, seed=2, dtype=torch.float32).abs() + 0.1).to(dtype)
    return x, smooth, layers.random(r, k, seed=3, dtype=dtype)


def shift_of(kind):
    return GELU_SHIFT if kind.endswith("unsigned") else 0.0


def expected(kind, x, smooth, down):
    if kind == "nvfp4":
        return reference.quantize_nvfp4(x, smooth, down)
    if kind.startswith("int8"):
        return reference.quantize_int8(x, smooth, down, shift_of(kind))
    if kind.startswith("e4m3"):
        codes, scales, hidden = expected(kind.replace("e4m3", "int4"), x, smooth, down)
        return *carrier.carried(codes, scales), hidden
    if kind == "int4-unsigned":
        return reference.quantize_int4_unsigned(x, smooth, down, GELU_SHIFT)
    return reference.quantize_int4(x, smooth, down)


def emulate(kind, x, smooth, down, arch=80, **how):
    name = "int8" if kind.startswith("int8") else kind.replace("e4m3", "int4")
    carried = kind.startswith("e4m3")
    card = Kernels(90 if carried else arch, **how)
    return card.quantize(name, x, smooth, down, shift=shift_of(kind), carried=carried)


def check(got, want):
    codes = [made[0].view(torch.uint8) for made in (got, want)]  # of e4m3 too: a zero has no sign
    assert got[0].dtype == want[0].dtype and torch.equal(*codes), "codes"
    assert got[1].dtype == want[1].dtype and torch.equal(got[1].float(), want[1].float()), "scales"
    assert_close(got[2], want[2], "fp32_sum")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("m", "k", "r"), SHAPES.values(), ids=SHAPES)
def test_quantize(kind, dtype, m, k, r):
    args = inputs(kind, m, k, r, dtype)
    check(emulate(kind, *args), expected(kind, *args))


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("k", [16, 48, 592], ids="k={}".format)
def test_int8_of_columns_that_fill_no_chunk(k, dtype):
    """What NVFP4 layers have: multiples of 16."""
    args = inputs("int8-unsigned", 18, k, 24, dtype)
    check(emulate("int8-unsigned", *args), expected("int8-unsigned", *args))


CARDS = (75, 80, 90)


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("kind", "arch"), [*product(["int4", "int8"], CARDS), ("e4m3", 90)])
def test_every_card_and_order_of_warps(kind, arch, dtype, backwards):
    """Turing has no bf16 products, and another fp16 one."""
    args = inputs(kind, 19, 640, 40, dtype)
    check(emulate(kind, *args, arch=arch, backwards=backwards), expected(kind, *args))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_type", TYPES.values(), ids=[f"x-{name}" for name in TYPES])
@pytest.mark.parametrize("w_type", TYPES.values(), ids=[f"w-{name}" for name in TYPES])
def test_activations_and_weights_of_two_types(kind, x_type, w_type):
    x, *_ = inputs(kind, 3, 128, 16, x_type)
    _, smooth, down = inputs(kind, 3, 128, 16, w_type)
    check(emulate(kind, x, smooth, down), expected(kind, x, smooth, down))


@pytest.mark.parametrize("offset", [0, 1, 4, 8], ids="starts-at-column-{}".format)
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("kind", ["int4", "int8", "e4m3"])
def test_columns_of_a_wider_matrix(kind, dtype, offset):
    """A host layer's slice: rows apart, and at addresses that forbid wide loads."""
    wide, smooth, down = inputs(kind, 17, 256, 16, dtype)
    args = wide[:, offset : offset + 192], smooth[:192].clone(), down[:, offset : offset + 192]
    check(emulate(kind, *args), expected(kind, *args))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_zeros_ties_and_extremes(kind, dtype):
    k = 256
    x = torch.zeros(6, k)
    x[1, ::2] = -0.0
    x[2] = torch.arange(k) % 29 / 2 - 7  # with smooth 1 and a largest of 7: half codes
    x[3, :] = torch.finfo(dtype).smallest_normal
    x[4, 5] = torch.finfo(dtype).max / 4
    x[5] = torch.exp2(torch.arange(k) % 24 - 14.0)
    args = x.to(dtype), torch.ones(k, dtype=dtype), torch.zeros(0, k, dtype=dtype)
    check(emulate(kind, *args), expected(kind, *args))


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "int8", "e4m3"])
def test_nan_reaches_the_scale(kind):
    x, smooth, down = inputs(kind, 2, 64, 0, torch.bfloat16)
    x[1, 3] = float("nan")
    scales = emulate(kind, x, smooth, down)[1].float()
    assert scales[0].isfinite().all() and scales[1, 0].isnan()


def test_refuses_what_it_cannot_read():
    x, smooth, down = inputs("int4", 2, 64, 16, torch.bfloat16)
    with pytest.raises(KernelError, match="smooth must be contiguous"):
        emulate("int4", x, smooth.repeat_interleave(2)[::2], down)
    for arch in (80, 120):
        with pytest.raises(KernelError, match="this card has no products of warpgroups"):
            Kernels(arch).quantize("int4", x, smooth, down, carried=True)
