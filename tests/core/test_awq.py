from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import awq, reference, tiles
from svdquant_nodes.svdquant.core.int4 import pack_nibbles, unpack_unsigned
from svdquant_nodes.tests import golden, layers, oracle
from svdquant_nodes.tests.tolerances import assert_close

MODULATION = ["a0", "a1", "a2"]


def test_dequantize_by_hand():
    # code 10 * 0.5 + (-3.5) = 1.5, code 0 -> -3.5, code 15 -> 4
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, :3] = torch.tensor([10, 0, 15])
    w = awq.dequantize_weight(pack_nibbles(codes), torch.tensor([[0.5]]), torch.tensor([[-3.5]]))
    assert w[0, :4].tolist() == [1.5, -3.5, 4.0, -3.5]


def test_quantize_weight_by_hand():
    # absmax 14 -> scale 2, zero -14; -14/2 + 7 = 0, 14/2 + 7 = 14, 1/2 + 7: half to even, 7; 3/2 + 7 -> 9
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([-14.0, 14.0, 1.0, 3.0])
    packed, scales, zeros = awq.quantize_weight(w, torch.bfloat16)
    assert scales.tolist() == [[2.0]] and zeros.tolist() == [[-14.0]]
    assert unpack_unsigned(packed)[0, :5].tolist() == [0, 14, 7, 9, 7]


def test_code_fifteen_is_never_written():
    packed, _, _ = awq.quantize_weight(layers.random(128, 128, seed=1), torch.bfloat16)
    codes = unpack_unsigned(packed)
    assert codes.min() == 0 and codes.max() == 14


@pytest.mark.parametrize("prefix", MODULATION)
def test_golden_zeros(prefix):
    t = golden.case("awq_w4a16", f"{prefix}.packed")
    assert torch.equal(awq.zeros_of(t["wscales"]), t["wzeros"])


@pytest.mark.parametrize("prefix", MODULATION)
def test_golden_codes_both_ways(prefix):
    w = golden.awq_linear(prefix)
    stored = golden.case("awq_w4a16", f"{prefix}.packed")["qweight"]
    assert torch.equal(tiles.untile_awq_codes(stored), w.codes)
    assert torch.equal(tiles.tile_awq_codes(w.codes).view(torch.int32), stored)


@pytest.mark.parametrize("prefix", ["t0", "t1"], ids=["t0-group-128", "t1-group-64-padded-rows"])
def test_golden_text_encoder_both_ways(prefix):
    logical = golden.case("awq_w4a16", f"{prefix}.logical")
    stored = golden.case("awq_w4a16", f"{prefix}.packed")
    packed = pack_nibbles(logical["q"])
    assert torch.equal(tiles.untile_awq_codes(stored["qweight"]), packed)
    assert torch.equal(tiles.tile_awq_codes(packed), stored["qweight"])
    groups = logical["scale"].shape[1]
    zeros = stored["scaled_zeros"][:groups].T
    assert torch.equal(stored["scales"][:groups].T, logical["scale"])
    assert torch.equal(zeros, -logical["zero_scaled"])
    w = awq.dequantize_weight(packed, logical["scale"], zeros)
    want = oracle.weight_awq(
        logical["q"].long().numpy(), oracle.values(logical["scale"]), oracle.values(zeros)
    )
    assert_close(w, want, "fp32_sum")


@pytest.mark.parametrize("splits", [3, 6])
def test_golden_modulation_rows_and_folded_one(splits):
    prefix = {3: "a1", 6: "a2"}[splits]
    t, w = golden.case("awq_w4a16", prefix), golden.awq_linear(prefix)
    bias = t["logical.bias"].unflatten(0, (splits, -1)).clone()
    bias[1::3] += 1  # the scale chunks: s = 1, and 4 where there are six
    assert torch.equal(golden.interleave(bias.flatten(), splits), w.bias)
    assert torch.equal(golden.interleave(t["logical.scale"], splits), w.scales)


def test_symmetric_weight_is_value_times_scale_up_to_the_rounded_zero():
    # zero = round_T(-7 s) is off by at most half an ulp of 7 s: 2^-8 * 7 s in bf16
    w = layers.random(16, 128, seed=2)
    packed, scales, zeros = awq.quantize_weight(w, torch.bfloat16)
    exact = (unpack_unsigned(packed).float() - 7) * scales.float().repeat_interleave(64, dim=1)
    off = (awq.dequantize_weight(packed, scales, zeros) - exact).abs()
    assert (off <= 7 * scales.float().repeat_interleave(64, dim=1) * 2**-8).all()


@pytest.mark.parametrize("value", [0.0, -0.4], ids=["all-zero", "all-equal"])
def test_constant_weight(value):
    w = torch.full((4, 64), value)
    assert_close(awq.dequantize_weight(*awq.quantize_weight(w, torch.float32)), w, "fp32_sum")


def test_golden_forward():
    t = golden.case("forward", "D")
    y = reference.gemv_awq(t["x"], golden.awq_linear("a2"))
    assert_close(y, t["y_exact"], "fp32_sum")
    assert_close(y, t["y_emul"], "bf16_kernel")


def test_kitchen_says_the_same():
    t = golden.case("kitchen", "a0")
    w = golden.awq_linear("a0")
    assert torch.equal(w.codes.view(torch.int8), t["kitchen.weight"])
    # kitchen's zero goes with code - 8, ours with code: zero + 8 * scale
    assert torch.equal((w.zeros.float() + 8 * w.scales.float()).T, t["kitchen.weight_zero_fp32"])
    assert_close(reference.gemv_awq(t["eager.x"], w), t["eager.y"], "fp32_sum")
