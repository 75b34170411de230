"""One linear in Nunchaku layout: the golden vectors both ways, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdquant_nodes.loaders.nunchaku_linear import V1, V2, decode_linear, encode_linear
from svdquant_nodes.svdquant.core import tiles
from svdquant_nodes.svdquant.core.int4 import pack_nibbles
from svdquant_nodes.svdquant.core.weights import INT4, LinearWeights
from svdquant_nodes.tests import golden, layers
from svdquant_nodes.tests.loaders import made

INT4_CASES = ["c0-codes-minus-8", "c1-columns-padded", "c2-rows-and-rank-padded-fp16", "c3-shift-in-bias"]
NVFP4_CASES = ["f0-one-second-scale", "f1-second-scale-per-row", "f2-rows-padded"]
AWQ_CASES = ["a0-one-chunk", "a1-three-chunks", "a2-six-chunks"]


def logical(name: str) -> LinearWeights:
    """A golden W4A4 linear in natural form; files do not mark unsigned layers."""
    case = name[:2]
    weights = golden.int4_linear(case) if case[0] == "c" else golden.nvfp4_linear(case)
    return replace(weights, spec=replace(weights.spec, act_shift=0.0))


def packed(name: str) -> dict[str, torch.Tensor]:
    case = name[:2]
    file = {"c": "svdq_int4_linear", "f": "svdq_nvfp4_linear", "a": "awq_w4a16", "t": "awq_w4a16"}[case[0]]
    return golden.case(file, f"{case}.packed")


def unpad(weights: LinearWeights, like: LinearWeights) -> LinearWeights:
    """True sizes; the padded ranks must hold nothing."""
    cut = weights.crop(like.out_features, like.in_features)
    assert not cut.down[like.rank :].any() and not cut.up[:, like.rank :].any()
    return replace(cut, down=cut.down[: like.rank], up=cut.up[:, : like.rank])


@pytest.mark.parametrize("name", INT4_CASES + NVFP4_CASES)
def test_golden_w4a4_decodes(name):
    weights = decode_linear(packed(name))
    assert weights.out_features % 128 == weights.in_features % 128 == weights.rank % 16 == 0
    assert made.same_tensors(unpad(weights, logical(name)).tensors(), logical(name).tensors())


@pytest.mark.parametrize("name", INT4_CASES + NVFP4_CASES)
def test_golden_w4a4_encodes(name):
    assert made.same_tensors(encode_linear(logical(name)), packed(name))


def plain_int4(case: str, smooth: torch.Tensor, bias: torch.Tensor) -> LinearWeights:
    t = golden.case("svdq_int4_linear", f"{case}.logical")
    return LinearWeights(
        INT4,
        pack_nibbles(t["q"]),
        t["scale"],
        smooth=smooth,
        down=t["lora_down"],
        up=t["branch_b"],
        bias=bias,
    )


def test_golden_without_bias_and_smoothing_holds_zeros_and_ones():
    weights = plain_int4("c4", torch.ones(128).bfloat16(), torch.zeros(128).bfloat16())
    assert made.same_tensors(decode_linear(packed("c4")).tensors(), weights.tensors())
    assert made.same_tensors(encode_linear(replace(weights, bias=None)), packed("c4"))


def test_golden_with_smoothing_fused_upstream():
    """The original vector, which no kernel reads, is not known any more once the layer is decoded."""
    t = golden.case("svdq_int4_linear", "c5.logical")
    weights = plain_int4("c5", torch.ones_like(t["smooth"]), t["bias"])
    assert made.same_tensors(decode_linear(packed("c5")).tensors(), weights.tensors())
    assert made.same_tensors(encode_linear(weights), packed("c5") | {"smooth_orig": packed("c5")["smooth"]})


@pytest.mark.parametrize("name", AWQ_CASES)
def test_golden_modulation_both_ways(name):
    weights = golden.awq_linear(name[:2])
    assert made.same_tensors(decode_linear(packed(name)).tensors(), weights.tensors())
    assert made.same_tensors(encode_linear(weights), packed(name))


def test_v2_names_are_the_same_bytes():
    v1, v2 = encode_linear(logical("c0"), V1), encode_linear(logical("c0"), V2)
    assert made.same_tensors({made.V2_NAMES.get(tail, tail): t for tail, t in v1.items()}, v2)
    assert made.same_tensors(decode_linear(v2).tensors(), logical("c0").tensors())


def test_bias_may_be_left_out():
    weights = replace(logical("c0"), bias=None)
    assert "bias" not in encode_linear(weights, zero_bias=False)
    assert decode_linear(encode_linear(weights, zero_bias=False)).bias is None


def test_no_branch_is_rank_zero():
    tensors = {k: v for k, v in packed("c0").items() if not k.startswith("lora")}
    weights = decode_linear(tensors)
    assert weights.rank == 0 and weights.up.shape == (128, 0)
    assert made.same_tensors(encode_linear(weights), tensors)


@pytest.mark.parametrize("which", ["wtscale", "wcscales", "both", "neither"])
def test_second_scales_of_nvfp4(which):
    """Lite files hold both, and one of them is 1; a true product stays in fp32."""
    tensors = packed("f1")
    rows = decode_linear(tensors).second_scale
    half = torch.tensor([0.5])
    given = {"wcscales": tensors.pop("wcscales"), "wtscale": half}
    chosen = given if which == "both" else {which: given[which]} if which in given else {}
    want = {"wtscale": half, "wcscales": rows, "both": rows.float() * half, "neither": torch.ones(1)}[which]
    assert made.same(decode_linear(tensors | chosen).second_scale, want)


def test_second_scale_of_one_beside_another_changes_nothing():
    tensors = packed("f1")
    rows = decode_linear(tensors).second_scale
    one = torch.ones(1).bfloat16()
    assert made.same(decode_linear(tensors | {"wtscale": one}).second_scale, rows)
    ones = {"wcscales": torch.ones(384).bfloat16(), "wtscale": one / 4}
    assert made.same(decode_linear(tensors | ones).second_scale, one / 4)


def test_nvfp4_scales_padded_to_64_columns_only():
    """The published packer pads codes to 128 columns and scales to 64; the missing groups have no weight."""
    weights = layers.random_linear("nvfp4", 128, 192)
    tensors = encode_linear(weights)
    tensors["wscales"] = tiles.tile_micro_scales(weights.scales)
    assert tensors["wscales"].shape == (12, 128) and tensors["qweight"].shape == (128, 128)
    assert made.same_tensors(decode_linear(tensors).crop(128, 192).tensors(), weights.tensors())


def test_awq_rows_come_in_fours():
    weights = golden.awq_linear("a0").rows(slice(0, 6))
    with pytest.raises(ValueError, match="expected rows in multiples of 4, got 6"):
        encode_linear(weights)
