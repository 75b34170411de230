"""Whole layers through a GPU library's entry points, emulated: quantizer and product must agree on every convention."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.kernels import select
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.core import test_tail
from svdquant_nodes.tests.kernels.emulated import COMPILER, EmulatedOps, library
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

SPELLINGS = {"mma_s4": 80, "mma_s8": 90, "mma_sm75": 75, "mxf4_sm120": 120}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", layers.COMPUTED)
@pytest.mark.parametrize(("spelling", "arch"), SPELLINGS.items(), ids=SPELLINGS)
def test_layer(spelling, arch, name, dtype):
    weights = layers.random_linear(name, 72, 192, 24, dtype=dtype)
    x = layers.random(19, 192, seed=8, dtype=dtype)
    if name.endswith("unsigned"):
        x = torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    got = linear.linear(x, weights, EmulatedOps(arch, spelling))
    assert_close(got, linear.linear(x, weights, reference), "split_branch")


FUSED = {
    "mma_s4": (80, "gelu_s4", "bf16"),
    "mma_sm75": (75, "gelu_sm75", "fp16"),
    "mma_s8": (120, "gelu_s8", "bf16"),
}


@pytest.mark.parametrize(("spelling", "to"), FUSED.items(), ids=FUSED)
def test_the_layers_of_a_single_block(spelling, to):
    """Finished together, they differ from each by itself in the order of the hidden values' sum alone."""
    arch, fused, dtype = to
    card = EmulatedOps(arch, spelling)
    ops = SimpleNamespace(
        quantize_int4=card.quantize_int4,
        quantize_int4_unsigned=card.quantize_int4_unsigned,
        gemm_int4=card.gemm_int4,
        gemm_int4_gelu=EmulatedOps(arch, fused).gemm_int4_gelu,
    )
    first, second = test_tail.pair(layers.DTYPES[dtype])
    x = layers.random(2, 19, test_tail.K, seed=9, dtype=layers.DTYPES[dtype])
    want = test_tail.apart(x, first, second, test_tail.attend, ops=ops)
    got = test_tail.together(x, first, second, test_tail.attend, ops=ops)
    assert_close(got, want, f"{dtype}_output")


@pytest.mark.parametrize("arch", [75, 80, 90, 120], ids="sm{}".format)
def test_spellings_of_a_card_are_the_rows_of_the_table(arch):
    listed = library(arch).list_spellings
    listed.restype = ctypes.c_char_p
    card = select.Device("cuda", capability=divmod(arch, 10))
    rows = [row for row in select.SPELLINGS if row.device == "cuda"]
    assert listed().decode().split() == [row.name for row in rows if not row.needs(card)]


TILES = {  # M, N, small
    "text-tokens": (512, 3072, False),
    "one-token": (1, 18432, True),
    "image-tokens": (4096, 3072, False),
    "few-outputs": (1024, 64, True),
}


@pytest.mark.parametrize(("m", "n", "small"), TILES.values(), ids=TILES)
def test_choice_of_tile(m, n, small):
    prefers = library(80).prefers_small_tile
    prefers.restype = ctypes.c_bool
    assert prefers(ctypes.c_int64(m), ctypes.c_int64(n)) == small
