"""NVFP4 by torch's block-scaled product: its operands against an oracle that reads them as cuBLAS's documents say, the
shapes against torch's own checks, and the whole spelling with that oracle in the product's place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.kernels import scaled, select, selftest
from svdquant_nodes.svdquant.kernels.trial import Trial
from svdquant_nodes.tests import layers, oracle
from svdquant_nodes.tests.kernels.test_spellings import NVFP4_SHAPES, SHAPES, activations, quantize
from svdquant_nodes.tests.kernels.test_spellings_rows import judge_columns
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(
    not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no pairs of e2m1"
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
RTX50 = select.Device("cuda", frozenset({select.BLOCK_SCALED}), (12, 0))
NO_LIBRARY = replace(RTX50, missing="no C++ compiler was found")


def place(row, group, groups):
    """Where cuBLAS looks for a scale, by its documents: tiles of 512 bytes, 128 rows high and four groups wide."""
    tile = row // 128 * -(-groups // 4) + group // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4


def values(pairs, scales):
    """An operand in float64: [rows, K/2] pairs, the low half first."""
    packed = pairs.view(torch.uint8).numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    groups = codes.shape[1] // 16
    numbers = oracle.values(scales)
    assert not np.signbit(numbers).any() and scales.dtype == torch.float8_e4m3fn
    at = np.array([[place(row, g, groups) for g in range(groups)] for row in range(len(packed))])
    return E2M1[codes] * np.repeat(numbers[at], 16, axis=1)


def by_the_documents(a, b, *, scale_a, scale_b, out_dtype):
    """torch._scaled_mm of e2m1, in float64."""
    assert a.is_contiguous() and b.T.is_contiguous()  # the one order of operands that every card takes
    return torch.from_numpy(values(a, scale_a) @ values(b.T, scale_b).T).to(out_dtype)


@pytest.fixture
def documented(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", by_the_documents)


# ---- operands ----

OPERANDS = {  # rows, K
    "one-scale": (1, 16),
    "tails": (70, 80),
    "a-tile": (128, 64),
    "a-tile-and-one": (129, 80),
    "tiles": (300, 320),
}


@pytest.mark.parametrize(("rows", "k"), OPERANDS.values(), ids=OPERANDS)
def test_scales_are_where_the_documents_say(rows, k):
    groups = k // 16
    scales = (torch.arange(rows * groups) % 127).to(torch.uint8).reshape(rows, groups)
    got = scaled.tiled(scales.view(torch.float8_e4m3fn)).view(torch.uint8)
    want = torch.zeros_like(got)
    for row in range(rows):
        for g in range(groups):
            want[place(row, g, groups)] = scales[row, g]
    assert torch.equal(got, want)
    assert got.numel() == -(-rows // 128) * 128 * -(-groups // 4) * 4


@pytest.mark.parametrize(("n", "k"), OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("m", [1, 19, 256], ids="m={}".format)
def test_torch_takes_the_shapes(m, n, k):
    """By the checks that torch makes without a GPU: multiples of 16, and so many scales."""

    def some(rows):
        codes = torch.empty(rows, k // 2, dtype=torch.uint8, device="meta")
        return codes, torch.empty(rows, k // 16, dtype=torch.float8_e4m3fn, device="meta")

    y = scaled.multiply(some(m), some(n))
    assert y.shape == (m, n) and y.dtype == torch.float32


def test_signs_of_scales_move_to_the_codes():
    w = layers.random_linear("nvfp4", 40, 80, 0)
    w.scales.view(torch.uint8)[::2, ::3] |= 0x80
    packed, scales = scaled.unsigned(w.codes, w.scales)
    moved = replace(w, codes=packed, scales=scales)
    assert not torch.signbit(scales.float()).any()
    assert np.array_equal(layers.main_weight(moved), layers.main_weight(w))


# ---- the spelling ----


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize(("m", "n", "k", "r"), (SHAPES | NVFP4_SHAPES).values(), ids=SHAPES | NVFP4_SHAPES)
def test_gemm(m, n, k, r):
    w, x = layers.random_linear("nvfp4", n, k, r), activations("nvfp4", m, k, torch.bfloat16)
    y = scaled.gemm_nvfp4(*quantize(scaled, x, w), w)
    assert_close(y, layers.forward(x, w), "fp32_sum")


@pytest.mark.usefixtures("documented")
def test_a_second_scale_for_each_row_and_scales_below_zero():
    w, x = layers.random_linear("nvfp4", 40, 80, 4), activations("nvfp4", 9, 80, torch.bfloat16)
    w.scales.view(torch.uint8)[1::2, ::2] |= 0x80
    w = replace(w, second_scale=torch.exp2(layers.random(40, seed=5)).to(torch.bfloat16))
    assert_close(scaled.gemm_nvfp4(*quantize(scaled, x, w), w), layers.forward(x, w), "fp32_sum")


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("dtype", layers.DTYPES)
def test_output_among_others(dtype):
    w = layers.random_linear("nvfp4", 63, 80, 16)
    quantized = quantize(reference, activations("nvfp4", 9, 80, torch.bfloat16), w)
    judge_columns(scaled, quantized, w, layers.DTYPES[dtype])


# ---- choice and trust ----


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("found", [RTX50, NO_LIBRARY], ids=["beside-our-library", "without-it"])
def test_self_test_lets_it_through(found):
    row = next(row for row in select.to_try(found) if row.name == select.TORCH_SCALED)
    assert selftest.problem(Trial(found, row.name), torch.device("cpu"), row.ops) is None


def test_self_test_notices_another_order_of_scales(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", by_the_documents)
    right = scaled.tiled
    monkeypatch.setattr(scaled, "tiled", lambda s: right(s).view(-1, 32, 4, 4).transpose(1, 2).flatten())
    fault = selftest.problem(Trial(RTX50, select.TORCH_SCALED), torch.device("cpu"), select.NVFP4_OPS)
    assert str(fault).startswith("gemm_nvfp4 is off by")


def test_self_test_names_what_torch_refuses():
    """A CPU has no such product."""
    fault = selftest.problem(Trial(RTX50, select.TORCH_SCALED), torch.device("cpu"), select.NVFP4_OPS)
    assert str(fault).startswith("gemm_nvfp4 ended with")
