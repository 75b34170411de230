from __future__ import annotations

import dataclasses

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.core.weights import AWQ, INT4, INT4_UNSIGNED, NVFP4, QuantSpec
from svdquant_nodes.tests.layers import EIGHT_BITS, FORMATS, random_linear

N, K, R = 96, 128, 16


def changed(name="int4", **fields):
    return dataclasses.replace(random_linear(name, N, K, R), **fields)


# ---- QuantSpec ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int3", 64), r"expected one of \('int4', 'nvfp4', 'awq', 'int8'\), got 'int3'"),
        (("int4", 0), "expected a positive multiple of 16, got 0"),
        (("int4", -64), "expected a positive multiple of 16, got -64"),
        (("nvfp4", 24), "expected a positive multiple of 16, got 24"),
        (("int4", None), "expected a positive multiple of 16, got None"),
        (("int8", 64), "expected None for int8, whose scales are a row's, got 64"),
        (("nvfp4", 16, 0.171875), "only integer activations are shifted, got nvfp4 with 0.171875"),
    ],
    ids=[
        "unknown-format",
        "group-zero",
        "group-negative",
        "group-not-of-16",
        "group-none",
        "group-on-int8",
        "shift-on-nvfp4",
    ],
)
def test_spec_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(*arguments)


def test_specs_of_published_files():
    assert (INT4.group, NVFP4.group, AWQ.group) == (64, 16, 64)
    # 11/64 lies above -min(gelu) = 0.17004, so nothing that comes out of a GELU stays negative
    assert INT4_UNSIGNED.act_shift == 11 / 64 and not INT4.act_shift


# ---- LinearWeights: what is taken ----


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_and_tensors(name):
    w = random_linear(name, N, K, R)
    assert (w.out_features, w.in_features, w.rank) == (N, K, 0 if name == "awq" else R)
    common = ["codes", "scales"]
    own = {"nvfp4": ["second_scale"], "awq": ["zeros"]}.get(name, [])
    branch = [] if name == "awq" else ["smooth", "down", "up"]
    assert list(w.tensors()) == [*common, *own, *branch, "bias"]


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_sizes_and_tensors_of_eight_bits(name):
    w = random_linear(name, N, K, R)
    assert (w.out_features, w.in_features, w.rank) == (N, K, R)
    assert list(w.tensors()) == ["codes", "scales", "smooth", "down", "up", "bias"]


def test_rank_zero_no_bias_and_one_group():
    w = changed(down=torch.zeros(0, K), up=torch.zeros(N, 0), bias=None)
    assert w.rank == 0 and "bias" not in w.tensors()
    assert random_linear("int4", 16, 64, R).scales.shape == (16, 1)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_linear("int4", N, K).bias = None


# ---- LinearWeights: what is refused ----

REFUSED = {
    "codes-unpacked-int8": (
        "int4",
        dict(codes=torch.zeros(N, K, dtype=torch.int8)),
        r"codes: expected packed uint8",
    ),
    "codes-one-axis": ("int4", dict(codes=torch.zeros(64, dtype=torch.uint8)), r"got torch\.uint8 \[64\]"),
    "k-not-of-group": (
        "int4",
        dict(codes=torch.zeros(N, 48, dtype=torch.uint8)),
        "K = 96 is not a multiple of the group 64",
    ),
    "scales-transposed": (
        "int4",
        dict(scales=torch.ones(2, N)),
        r"scales: expected shape \[96, 2\], got \[2, 96\]",
    ),
    "smooth-short": ("int4", dict(smooth=torch.ones(64)), r"smooth: expected shape \[128\], got \[64\]"),
    "down-transposed": (
        "int4",
        dict(down=torch.ones(K, R)),
        r"down: expected shape \[128, 128\], got \[128, 16\]",
    ),
    "ranks-differ": ("int4", dict(up=torch.ones(N, 32)), r"up: expected shape \[96, 16\], got \[96, 32\]"),
    "bias-short": ("int4", dict(bias=torch.ones(4)), r"bias: expected shape \[96\], got \[4\]"),
    "smooth-missing": ("int4", dict(smooth=None), "int4 linear: smooth missing or out of place"),
    "branch-half": ("nvfp4", dict(up=None), "nvfp4 linear: up missing or out of place"),
    "branch-none": ("int4", dict(up=None, down=None), "int4 linear: down, up missing or out of place"),
    "second-missing": ("nvfp4", dict(second_scale=None), "nvfp4 linear: second_scale missing"),
    "second-of-two": (
        "nvfp4",
        dict(second_scale=torch.ones(2)),
        r"second_scale: expected shape \[96\], got \[2\]",
    ),
    "second-on-int4": (
        "int4",
        dict(second_scale=torch.ones(1)),
        "int4 linear: second_scale missing or out of place",
    ),
    "zeros-missing": ("awq", dict(zeros=None), "awq linear: zeros missing or out of place"),
    "zeros-short": ("awq", dict(zeros=torch.zeros(N, 1)), r"zeros: expected shape \[96, 2\], got \[96, 1\]"),
    "smooth-on-awq": ("awq", dict(smooth=torch.ones(K)), "awq linear: smooth missing or out of place"),
    "e4m3-on-int4": (
        "int4",
        dict(scales=torch.ones(N, 2).to(torch.float8_e4m3fn)),
        r"scales: int4 expects a 16-bit float, got torch\.float8_e4m3fn",
    ),
    "bf16-on-nvfp4": (
        "nvfp4",
        dict(scales=torch.ones(N, 8, dtype=torch.bfloat16)),
        r"scales: nvfp4 expects e4m3, got torch\.bfloat16",
    ),
    "packed-codes-on-int8": (
        "int8-of-int4",
        dict(codes=torch.zeros(N, K, dtype=torch.uint8)),
        r"codes: expected int8 \[N, K\], got torch\.uint8 \[96, 128\]",
    ),
    "grouped-scales-on-int8": (
        "int8-of-int4",
        dict(scales=torch.ones(N, 2)),
        r"scales: expected shape \[96, 1\], got \[96, 2\]",
    ),
}


@pytest.mark.parametrize("name, fields, message", REFUSED.values(), ids=REFUSED)
def test_refuses(name, fields, message):
    with pytest.raises(ValueError, match=message):
        changed(name, **fields)


# ---- rows and crop ----


@pytest.mark.parametrize("name", [*FORMATS, *EIGHT_BITS])
@pytest.mark.parametrize(
    "index", [slice(16, 80), torch.arange(N - 1, -1, -1)], ids=["slice", "reversed-by-tensor"]
)
def test_rows_are_the_rows_of_the_dense_weight(name, index):
    w = random_linear(name, N, K, R)
    part = w.rows(index)
    assert torch.equal(reference.dequantize(part), reference.dequantize(w)[index])
    assert torch.equal(part.bias, w.bias[index])


def test_rows_take_their_own_second_scale():
    w = changed("nvfp4", second_scale=torch.arange(1.0, N + 1))
    assert w.rows(slice(3, 5)).second_scale.tolist() == [4, 5]
    assert w.rows(slice(3, 4)).second_scale.tolist() == [4]
    assert changed("nvfp4", second_scale=torch.ones(1)).rows(slice(3, 5)).second_scale.tolist() == [1]


@pytest.mark.parametrize("name", [*FORMATS, *EIGHT_BITS])
def test_crop_drops_padding(name):
    w = random_linear(name, N, K, R)
    small = w.crop(80, 64)
    assert (small.out_features, small.in_features, small.rank) == (80, 64, w.rank)
    assert torch.equal(reference.dequantize(small), reference.dequantize(w)[:80, :64])


def test_crop_to_its_own_size_changes_nothing():
    w = random_linear("nvfp4", N, K, R)
    same = w.crop(N, K).tensors()
    assert all(torch.equal(t.view(torch.uint8), same[k].view(torch.uint8)) for k, t in w.tensors().items())


@pytest.mark.parametrize(
    "n, k", [(N + 1, K), (N, K + 64), (N, 96)], ids=["more-rows", "more-columns", "half-group"]
)
def test_crop_refuses(n, k):
    with pytest.raises(
        ValueError, match=rf"crop: a \[96, 128\] layer of group 64 cannot become \[{n}, {k}\]"
    ):
        random_linear("int4", N, K).crop(n, k)
