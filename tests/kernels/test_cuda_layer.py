"""Whole layers through a GPU library's entry points, emulated: quantizer and product must agree on every convention."""

from __future__ import annotations

import ctypes

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.kernels import select
from svdquant_nodes.tests import layers
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
