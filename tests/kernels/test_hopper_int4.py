"""Exact W4A4 on an emulated Hopper card: whole layers against the reference, group sums to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdquant_nodes.svdquant.core import int4, linear, reference
from svdquant_nodes.svdquant.core.weights import INT4, LinearWeights
from svdquant_nodes.svdquant.kernels import carrier
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, EmulatedOps, KernelError
from svdquant_nodes.tests.kernels.emulated_hopper import ARCH, Hopper
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

CLUSTERS = pytest.mark.parametrize("clusters", [False, True], ids=["alone", "fours"])
SHAPES = {  # M, N, K, R
    "m=1-one-token": (1, 128, 128, 16),
    "m=17-tail": (17, 72, 192, 40),
    "m=130-n=130-four-tiles": (130, 130, 128, 16),
    "m=260-n=260-nine-tiles": (260, 260, 192, 16),
    "n=1-one-output": (3, 1, 64, 16),
    "n=67-odd": (5, 67, 128, 128),
    "k=64-half-a-step": (4, 64, 64, 0),
    "k=1088-stages-go-round": (2, 64, 1088, 16),
    "m=0-empty": (0, 64, 64, 16),
}


def inputs(kind, m, n, k, r, dtype=torch.bfloat16):
    weights = layers.random_linear("int4", n, k, r, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(5)
    low, high, code_type = (-8, 8, torch.int8) if kind == "signed" else (0, 16, torch.uint8)
    codes = torch.randint(low, high, (m, k), generator=generator).to(code_type)
    scales = (torch.rand(m, k // 64, generator=generator) + 0.1).to(dtype)
    return codes, scales, layers.random(m, r, seed=6), weights


@CLUSTERS
@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES.values(), ids=SHAPES)
def test_gemm_int4(clusters, backwards, kind, m, n, k, r):
    args = inputs(kind, m, n, k, r)
    got = Hopper(backwards=backwards, sms=1, clusters=clusters).gemm_int4(*args)
    assert_close(got, reference.gemm_int4(*args), "split_branch")


@CLUSTERS
@pytest.mark.parametrize("sms", [1, 9, 132], ids="sms={}".format)
def test_blocks_take_tiles_in_turn(clusters, sms):
    """Nine tiles: one cluster takes all four fours of them, or two share them, or each of four has one."""
    args = inputs("signed", 260, 300, 320, 40)
    got = Hopper(sms=sms, clusters=clusters).gemm_int4(*args)
    assert_close(got, reference.gemm_int4(*args), "split_branch")


@CLUSTERS
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
@pytest.mark.parametrize("groups", [1, 2, 3, 8], ids="groups={}".format)
def test_group_sums_to_the_bit(clusters, kind, groups):
    """Scales of 1 and no branch: the output is the sum of integers, with the largest sums a group can have."""
    n, k = 72, 64 * groups
    codes = inputs(kind, 20, n, k, 0)[0]
    packed = int4.pack_nibbles(torch.randint(-8, 8, (n, k)))
    packed[0] = 0x88  # all -8
    codes[3] = -8 if kind == "signed" else 15
    ones, empty = torch.ones(n, groups), torch.zeros(n, 0)
    weights = LinearWeights(INT4, packed, ones, smooth=torch.ones(k), down=torch.zeros(0, k), up=empty)
    got = Hopper(clusters=clusters).gemm_int4(codes, torch.ones(20, groups), torch.zeros(20, 0), weights)
    assert torch.equal(got, (codes.long() @ int4.unpack_signed(packed).long().T).float())


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_every_code_is_exact(kind):
    """One product at a time: every code by every weight, which no rounding may touch."""
    low, high = (-8, 8) if kind == "signed" else (0, 16)
    codes = torch.zeros(high - low, 64, dtype=torch.int8 if kind == "signed" else torch.uint8)
    codes[:, 5] = torch.arange(low, high)
    packed = int4.pack_nibbles(torch.arange(-8, 8).unsqueeze(1).expand(16, 64))
    weights = LinearWeights(
        INT4, packed, torch.ones(16, 1), smooth=torch.ones(64), down=torch.zeros(0, 64), up=torch.zeros(16, 0)
    )
    got = Hopper().gemm_int4(codes, torch.ones(high - low, 1), torch.zeros(high - low, 0), weights)
    assert torch.equal(got, torch.outer(torch.arange(low, high), torch.arange(-8, 8)).float())


@pytest.mark.parametrize("dtype", layers.DTYPES.values(), ids=layers.DTYPES)
def test_types(dtype):
    """Every type of scales, up, bias and output."""
    args = inputs("signed", 5, 67, 128, 24, dtype)
    got = Hopper().gemm_int4(*args, dtype=dtype)
    name = {torch.float32: "split_branch", torch.bfloat16: "bf16_output", torch.float16: "fp16_output"}[dtype]
    assert got.dtype == dtype
    assert_close(got, reference.gemm_int4(*args), name)


def test_without_bias_and_groups_apart():
    """Scales of some tokens among those of others."""
    codes, scales, hidden, weights = inputs("signed", 5, 64, 192, 16)
    weights, codes = replace(weights, bias=None), carrier.carried(codes, scales)[0]
    wide = torch.full((3, 16), float("nan"))
    wide[:, 4:9] = scales.T
    args = codes, wide[:, 4:9].T, hidden, weights
    assert_close(Hopper().gemm_int4(*args), reference.gemm_int4(*args), "split_branch")


@pytest.mark.parametrize("spelling", ["wgmma_e4m3", "wgmma_e4m3_x4"])
@pytest.mark.parametrize("name", ["int4", "int4-unsigned"])
@pytest.mark.parametrize("tokens", [5, 130], ids=["one-row-of-tiles", "two-rows"])
def test_layer(name, tokens, spelling):
    """Through the entry points: what the quantizer writes is what the product reads."""
    weights = layers.random_linear(name, 72, 192, 24)
    x = layers.random(tokens, 192, seed=8, dtype=torch.bfloat16)
    if name == "int4-unsigned":
        x = torch.nn.functional.gelu(x.float(), approximate="tanh").bfloat16()
    got = linear.linear(x, weights, EmulatedOps(ARCH, spelling))
    assert_close(got, linear.linear(x, weights, reference), "split_branch")


def test_refusals():
    codes, scales, hidden, weights = inputs("signed", 2, 64, 64, 16)
    codes, scales = carrier.carried(codes, scales)
    shifted = torch.zeros(1 + codes.numel(), dtype=carrier.CODES)[1:].view(2, 64)
    with pytest.raises(KernelError, match="multiple of 16 bytes"):
        Hopper().gemm_int4(shifted, scales, hidden, weights)
