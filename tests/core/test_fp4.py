from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import fp4
from svdquant_nodes.svdquant.core.int4 import pack_nibbles, unpack_unsigned
from svdquant_nodes.tests import golden, layers, oracle
from svdquant_nodes.tests.tolerances import assert_close

CASES = ["f0", "f1", "f2"]
# every value, every midpoint, and a step to either side of each: all the decisions a rounding takes
NEIGHBOURS = sorted(
    {v + d for v in (*oracle.E2M1, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0) for d in (-1e-3, 0, 1e-3)}
)


def test_decode_every_code():
    want = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    got = fp4.decode(torch.arange(16, dtype=torch.uint8))
    assert got.tolist() == want and torch.signbit(got[8])


def test_encoders_undo_decode():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(fp4.encode_act(fp4.decode(codes)), codes)
    # offline, -0 becomes 0
    assert fp4.encode_weight(fp4.decode(codes)).tolist() == [*range(8), 0, *range(9, 16)]


def test_golden_encoder_ties():
    t = golden.case("svdq_nvfp4_linear", "enc")
    assert torch.equal(fp4.encode_weight(t["x"]), t["code"])


def test_hardware_ties_go_to_the_even_code():
    # between 0|.5, .5|1, 1|1.5, 1.5|2, 2|3, 3|4, 4|6: codes 0, 2, 2, 4, 4, 6, 6
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fp4.encode_act(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert fp4.encode_act(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize(
    "encode, judge",
    [(fp4.encode_act, oracle.e2m1_code), (fp4.encode_weight, oracle.e2m1_code_offline)],
    ids=["hardware", "offline"],
)
def test_encoders_agree_with_oracle(encode, judge, sign):
    x = torch.tensor(NEIGHBOURS) * sign
    assert encode(x).tolist() == [judge(v) for v in x.tolist()]


def test_saturates_and_keeps_the_sign_of_zero():
    x = torch.tensor([1e30, -1e30, torch.inf, 0.0, -0.0])
    assert fp4.encode_act(x).tolist() == [7, 15, 7, 0, 8]
    assert fp4.encode_weight(x).tolist() == [7, 15, 7, 0, 0]


def test_to_e4m3_saturates_and_keeps_nan():
    x = torch.tensor([torch.inf, -1e9, 448.0, 464.0, 2.0**-10, 2.0**-10 * 1.01, torch.nan])
    got = fp4.to_e4m3(x).float()
    # 2^-10 is half of the smallest e4m3 number 2^-9: the tie goes to 0
    assert got[:6].tolist() == [448, -448, 448, 448, 0, 2.0**-9] and got[6].isnan()


def test_to_e4m3_agrees_with_oracle():
    x = layers.random(4000, seed=1) * torch.exp2(layers.random(4000, seed=2) * 5)
    assert (oracle.values(fp4.to_e4m3(x)) == oracle.round_to(oracle.values(x), "e4m3")).all()


@pytest.mark.parametrize("prefix", CASES)
def test_golden_dequantizes(prefix):
    t = golden.case("svdq_nvfp4_linear", f"{prefix}.logical")
    got = fp4.dequantize_weight(pack_nibbles(t["code"]), t["subscale_e4m3"], t["scale0"])
    want = oracle.weight_nvfp4(
        t["code"].long().numpy(), oracle.values(t["subscale_e4m3"]), oracle.values(t["scale0"])
    )
    # 2 + 4 + 8 significant bits: exact in fp32
    assert (oracle.values(got) == want).all()


def test_quantize_weight_by_hand():
    # absmax 2688 = 6 * 448 -> second scale 1; group 0: absmax 2688 -> e4m3 448;
    # group 1: absmax 12 -> 2, and 5/2 = 2.5 is a tie: down to 2, code 4
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 16:19] = 2688.0, torch.tensor([12.0, 5.0, -1.0])
    packed, scales, second = fp4.quantize_weight(w, torch.bfloat16)
    assert second.tolist() == [1.0] and scales.float().tolist() == [[448.0, 2.0]]
    codes = unpack_unsigned(packed)[0]
    # -1/2 = -0.5 is code 1 with the sign bit
    assert codes[0] == 7 and codes[16:20].tolist() == [7, 4, 9, 0]


def test_the_largest_magnitude_may_be_negative():
    # absmax 2688 = 6 * 448 -> second scale 1 and group scale 448; -2688/448 = -6 is code 15
    w = torch.zeros(1, 16)
    w[0, :2] = torch.tensor([-2688.0, 448.0])
    packed, scales, second = fp4.quantize_weight(w, torch.bfloat16)
    assert second.tolist() == [1.0] and scales.float().tolist() == [[448.0]]
    assert unpack_unsigned(packed)[0, :3].tolist() == [15, 2, 0]


def test_quantize_weight_keeps_what_four_bits_can():
    w = layers.random(64, 256, seed=3)
    assert_close(fp4.dequantize_weight(*fp4.quantize_weight(w, torch.bfloat16)), w, "nvfp4_weight")


@pytest.mark.parametrize("value", [0.0, 0.7], ids=["all-zero", "all-equal"])
def test_quantize_weight_of_a_constant(value):
    back = fp4.dequantize_weight(*fp4.quantize_weight(torch.full((3, 32), value), torch.float32))
    assert_close(back, torch.full((3, 32), value), "fp32_sum")


def test_a_group_far_below_the_largest_vanishes_without_nan():
    w = torch.full((1, 32), 1e-9)
    w[0, 0] = 1e6
    back = fp4.dequantize_weight(*fp4.quantize_weight(w, torch.bfloat16))
    assert back[0, 1:].abs().max() == 0 and back.isfinite().all()


def test_second_scale_by_row_multiplies_its_row():
    packed, scales = torch.full((2, 8), 0x22, dtype=torch.uint8), torch.ones(2, 1).to(torch.float8_e4m3fn)
    got = fp4.dequantize_weight(packed, scales, torch.tensor([2.0, 3.0]))
    assert (got == torch.tensor([[2.0], [3.0]])).all()


def test_nothing_is_copied_to_a_device(monkeypatch):
    """A GPU would be waited for at every call, and a CUDA graph would refuse it."""
    monkeypatch.setattr(torch, "tensor", None)
    codes = fp4.encode_act(torch.linspace(-7, 7, 99))
    assert fp4.decode(codes).abs().max() == 6
