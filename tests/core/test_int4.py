from __future__ import annotations

import numpy as np
import pytest
import torch

from svdquant_nodes.svdquant.core import int4
from svdquant_nodes.tests import golden, layers, oracle
from svdquant_nodes.tests.tolerances import assert_close

CASES = [f"c{i}" for i in range(6)]


def test_nibbles_by_hand():
    # columns 0..3 = 1, -8, 7, -1: nibbles 0x1, 0x8, 0x7, 0xF; the even column is the low half of its byte
    codes = torch.tensor([[1, -8, 7, -1]], dtype=torch.int8)
    packed = int4.pack_nibbles(codes)
    assert packed.dtype == torch.uint8 and packed.tolist() == [[0x81, 0xF7]]
    assert int4.unpack_signed(packed).tolist() == [[1, -8, 7, -1]]
    assert int4.unpack_unsigned(packed).tolist() == [[1, 8, 7, 15]]


def test_every_byte_survives_both_readings():
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert torch.equal(int4.pack_nibbles(int4.unpack_unsigned(packed)), packed)
    assert torch.equal(int4.pack_nibbles(int4.unpack_signed(packed)), packed)
    assert (int4.unpack_signed(packed).numpy() == oracle.nibbles(packed, signed=True)).all()


def test_quantize_weight_by_hand():
    # absmax 3.5 -> scale 0.5; 3.5/.5 = 7, -3.5/.5 = -7; ties to even: 0.25/.5 = 0.5 -> 0, 0.75/.5 = 1.5 -> 2
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([3.5, -3.5, 0.25, 0.75])
    packed, scales = int4.quantize_weight(w, torch.bfloat16)
    assert scales.dtype == torch.bfloat16 and scales.tolist() == [[0.5]]
    assert int4.unpack_signed(packed)[0, :5].tolist() == [7, -7, 0, 2, 0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_quantize_weight_agrees_with_oracle(dtype):
    w = layers.random(6, 192, seed=1)
    packed, scales = int4.quantize_weight(w, layers.DTYPES[dtype])
    codes, want = oracle.weight_codes_int4(oracle.values(w), dtype)
    assert (oracle.values(scales) == want).all()
    assert (int4.unpack_signed(packed).numpy() == codes).all()


def test_quantize_weight_keeps_what_four_bits_can():
    w = layers.random(64, 256, seed=2)
    assert_close(int4.dequantize_weight(*int4.quantize_weight(w, torch.bfloat16)), w, "int4_weight")


def test_zero_group_has_scale_one():
    w = torch.cat([torch.zeros(2, 64), torch.ones(2, 64)], dim=1)
    packed, scales = int4.quantize_weight(w, torch.float16)
    assert scales[:, 0].tolist() == [1, 1]
    assert int4.dequantize_weight(packed, scales)[:, :64].abs().max() == 0


def test_outlier_is_exact_and_its_group_is_lost():
    w = torch.full((1, 128), 0.01)
    w[0, 5] = -700.0
    back = int4.dequantize_weight(*int4.quantize_weight(w, torch.float32))
    assert back[0, 5] == -700.0
    assert back[0, :64].abs().sum() == 700.0
    # 0.01 / (0.01 / 7) = 7 in the untouched group
    assert_close(back[0, 64:], w[0, 64:], "fp32_sum")


def test_all_equal_group_takes_the_largest_code():
    packed, _ = int4.quantize_weight(torch.full((1, 64), 0.3), torch.bfloat16)
    assert set(int4.unpack_signed(packed).flatten().tolist()) == {7}


def test_rounded_down_scale_never_leaves_the_stored_range():
    # bf16 rounds some scales down, by 2^-9 at most: the largest quotient is 7.014, never 7.5
    w = layers.random(256, 64, seed=3)
    codes = int4.unpack_signed(int4.quantize_weight(w, torch.bfloat16)[0])
    assert codes.min() == -7 and codes.max() == 7


@pytest.mark.parametrize("prefix", CASES)
def test_golden_dequantizes(prefix):
    t = golden.case("svdq_int4_linear", f"{prefix}.logical")
    want = oracle.weight_int4(oracle.values(t["q"]), oracle.values(t["scale"]))
    got = int4.dequantize_weight(int4.pack_nibbles(t["q"]), t["scale"])
    # a 4-bit integer times an 8 or 11-bit scale: exact in fp32
    assert (oracle.values(got) == want).all()


def test_minus_eight_is_a_weight():
    t = golden.case("svdq_int4_linear", "c0.logical")
    assert t["q"].min() == -8
    packed = torch.full((1, 32), 0x88, dtype=torch.uint8)
    assert (int4.dequantize_weight(packed, torch.tensor([[0.5]])) == -4).all()


def test_no_rows():
    packed, scales = int4.quantize_weight(torch.zeros(0, 128), torch.bfloat16)
    assert packed.shape == (0, 64) and scales.shape == (0, 2)
    assert int4.dequantize_weight(packed, scales).shape == (0, 128)


def test_float64_weight_is_taken():
    w = layers.random(2, 64, seed=4).double() + 1e-12
    packed, scales = int4.quantize_weight(w, torch.bfloat16)
    same = int4.quantize_weight(w.float(), torch.bfloat16)
    assert torch.equal(packed, same[0]) and torch.equal(scales, same[1])
    assert np.isfinite(oracle.values(scales)).all()
