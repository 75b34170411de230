from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.core.int4 import unpack_signed, unpack_unsigned
from svdquant_nodes.tests import golden, layers, oracle
from svdquant_nodes.tests.tolerances import assert_close

W4A4 = ["int4", "int4-unsigned", "nvfp4"]
QUANTIZED = [*W4A4, *layers.EIGHT_BITS]
SHAPES = {  # M, N, K, R
    "m=1-gemv": (1, 128, 256, 16),
    "m=17-tail": (17, 128, 256, 32),
    "n=200-no-tile": (3, 200, 128, 16),
    "k=64-one-group": (4, 64, 64, 16),
    "k=3072-flux-width": (2, 48, 3072, 32),
    "r=0-no-branch": (5, 128, 192, 0),
    "r=20-no-multiple-of-16": (5, 128, 192, 20),
    "m=0-empty": (0, 128, 128, 16),
}


def activations(name, m, k, dtype, seed=7):
    """Gaussian tokens; what an unsigned layer sees has been through a GELU."""
    x = layers.random(m, k, seed=seed, dtype=dtype)
    if name.endswith("unsigned"):
        return torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    return x


def quantize(x, w):
    if w.spec.format == "int8":
        return reference.quantize_int8(x, w.smooth, w.down, w.spec.act_shift)
    if w.spec.format == "nvfp4":
        return reference.quantize_nvfp4(x, w.smooth, w.down)
    if w.spec.act_shift:
        return reference.quantize_int4_unsigned(x, w.smooth, w.down, w.spec.act_shift)
    return reference.quantize_int4(x, w.smooth, w.down)


def gemm(codes, scales, hidden, w):
    return getattr(reference, f"gemm_{w.spec.format}")(codes, scales, hidden, w)


# ---- golden forwards ----

FORWARDS = {  # weights, input, codes, scales, exact output, kernel-like output
    "A-signed": (lambda: golden.int4_linear("c0"), "A", "x", "qa", "sa", "y_exact", "y_emul"),
    "B-fc1": (lambda: golden.int4_linear("c1"), "B", "x", "fc1_qa", "fc1_sa", "fc1_exact", "fc1_emul"),
    "B-fc2-unsigned": (
        lambda: golden.int4_linear("c3"),
        "B",
        "gelu",
        "fc2_qa",
        "fc2_sa",
        "y_exact",
        "y_emul",
    ),
    "C_f0-tensor-scale": (lambda: golden.nvfp4_linear("f0"), "C_f0", "x", "code", "sa", "y_exact", "y_emul"),
    "C_f1-channel-scale": (lambda: golden.nvfp4_linear("f1"), "C_f1", "x", "code", "sa", "y_exact", "y_emul"),
}


@pytest.mark.parametrize("make, prefix, x, qa, sa, exact, kernel", FORWARDS.values(), ids=FORWARDS)
def test_golden_forward(make, prefix, x, qa, sa, exact, kernel):
    t, w = golden.case("forward", prefix), make()
    codes, scales, hidden = quantize(t[x], w)
    assert codes.shape == t[qa].shape and torch.equal(codes.to(t[qa].dtype), t[qa])
    assert scales.dtype == t[sa].dtype and torch.equal(scales.float(), t[sa].float())
    y = gemm(codes, scales, hidden, w)
    assert_close(y, t[exact], "fp32_sum")
    assert_close(y, t[kernel], "bf16_kernel")


@pytest.mark.parametrize("make, prefix, x", [f[:3] for f in FORWARDS.values()], ids=FORWARDS)
def test_oracle_agrees_with_golden(make, prefix, x):
    """The judge is judged too: it must find the golden output from the natural weights."""
    t = golden.case("forward", prefix)
    exact = "fc1_exact" if (prefix, x) == ("B", "x") else "y_exact"
    assert_close(layers.forward(t[x], make()), t[exact], "fp32_sum")


@pytest.mark.parametrize("prefix", ["c1", "c3"], ids=["signed", "unsigned"])
def test_kitchen_eager_agrees(prefix):
    """Another implementation: it divides by 7 where this one multiplies by 1/7."""
    t, w = golden.case("kitchen", f"{prefix}.eager"), golden.int4_linear(prefix)
    codes, scales, hidden = quantize(t["x"], w)
    unpack = unpack_unsigned if w.spec.act_shift else unpack_signed
    assert torch.equal(codes, unpack(t["q"].view(torch.uint8)))
    assert_close(scales.T, t["ascales"], "fp32_sum")
    assert_close(gemm(codes, scales, hidden, w), t["y"], "fp32_sum")


# ---- against the oracle ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_agrees_with_oracle(name, dtype, shape):
    m, n, k, rank = shape
    w = layers.random_linear(name, n, k, rank, dtype=layers.DTYPES[dtype])
    x = activations(name, m, k, layers.DTYPES[dtype])
    codes, scales, hidden = quantize(x, w)
    want_codes, want_scales = layers.quantize(x, w)
    assert (codes.numpy() == want_codes).all() and (oracle.values(scales) == want_scales).all()
    assert_close(hidden, oracle.values(x) @ oracle.values(w.down).T, "fp32_sum")
    y = gemm(codes, scales, hidden, w)
    assert y.dtype == torch.float32 and y.shape == (m, n)
    assert_close(y, layers.forward(x, w), "fp32_sum")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", layers.DTYPES)
def test_awq_agrees_with_oracle(dtype, shape):
    m, n, k, _ = shape
    w = layers.random_linear("awq", n, k, dtype=layers.DTYPES[dtype])
    x = layers.random(m, k, seed=7, dtype=layers.DTYPES[dtype])
    y = reference.gemv_awq(x, w)
    assert y.dtype == torch.float32
    assert_close(y, layers.forward(x, w), "fp32_sum")


def test_awq_rows_are_computed_in_parts():
    """One row of weights more than are dequantized at a time."""
    w = layers.random_linear("awq", reference.AWQ_ROWS + 1, 64, dtype=torch.float32)
    x = layers.random(3, 64, seed=7)
    assert_close(reference.gemv_awq(x, w), layers.forward(x, w), "fp32_sum")


@pytest.mark.parametrize("name", W4A4)
def test_a_layer_keeps_what_four_bits_can(name):
    """The dense weight times raw x, plus the plain bias, is what the quantized layer approximates."""
    w = layers.random_linear(name, 128, 1024, 16)
    x = activations(name, 32, 1024, torch.bfloat16)
    plain_bias = w.bias.double() + reference.shift_compensation(w).double()
    want = x.double() @ reference.dequantize(w).double().T + plain_bias
    assert_close(gemm(*quantize(x, w), w), want, name.replace("-", "_") + "_layer")


@pytest.mark.parametrize("name", [*layers.FORMATS, *layers.EIGHT_BITS])
def test_dequantize_agrees_with_oracle(name):
    w = layers.random_linear(name, 80, 192, 16)
    assert_close(reference.dequantize(w), layers.dense(w), "fp32_sum")


def test_a_bias_compensates_for_the_shift_of_every_column():
    w = golden.int4_linear("c3")
    t = golden.case("svdq_int4_linear", "c3.logical")
    residual = oracle.weight_int4(oracle.values(t["q"]), oracle.values(t["scale"])) / oracle.values(
        t["smooth"]
    )
    assert_close(reference.shift_compensation(w), residual.sum(1) * 0.171875, "fp32_sum")


def test_without_a_shift_there_is_nothing_to_compensate_for():
    w = golden.int4_linear("c0")
    assert torch.equal(reference.shift_compensation(w), torch.zeros(w.out_features))


# ---- by hand and at the edges ----


def one_group(*head, dtype=torch.float32, size=64):
    x = torch.zeros(1, size, dtype=dtype)
    x[0, : len(head)] = torch.tensor(head, dtype=dtype)
    return x, torch.ones(size, dtype=dtype), torch.zeros(0, size, dtype=dtype)


def test_signed_by_hand():
    # absmax 14 -> scale 2; 14/2 = 7, -14/2 = -7, 1/2 and 5/2 are ties: to even, 0 and 2; 3/2 = 1.5 -> 2
    codes, scales, hidden = reference.quantize_int4(*one_group(14, -14, 1, 5, 3))
    assert codes.dtype == torch.int8 and codes[0, :6].tolist() == [7, -7, 0, 2, 2, 0]
    assert scales.tolist() == [[2.0]] and hidden.shape == (1, 0)


def test_unsigned_by_hand():
    # shift 2 -> values 30, 0, 5, the rest 2; absmax 30 -> scale 2; 30/2 = 15, 0, 5/2 -> 2, 2/2 = 1
    x, smooth, down = one_group(28, -2, 3)
    codes, scales, _ = reference.quantize_int4_unsigned(x, smooth, down, 2.0)
    assert codes.dtype == torch.uint8 and codes[0, :4].tolist() == [15, 0, 2, 1]
    assert scales.tolist() == [[2.0]]


def test_unsigned_codes_end_at_zero():
    # shift 2 -> values 30 and -6, the rest 2; absmax 30 -> scale 2; what the shift does not reach is 0, not 16 - 3
    codes, scales, _ = reference.quantize_int4_unsigned(*one_group(28, -8), 2.0)
    assert codes[0, :3].tolist() == [15, 0, 1] and scales.tolist() == [[2.0]]


def test_nvfp4_by_hand():
    # absmax 12 -> scale 2; 12/2 = 6 code 7; -5/2 = -2.5 -> -2 code 12; 1/2 code 1; -0 keeps its sign: code 8
    codes, scales, _ = reference.quantize_nvfp4(*one_group(12, -5, 1, -0.0, size=16))
    assert codes[0, :5].tolist() == [7, 12, 1, 8, 0] and scales.float().tolist() == [[2.0]]


def test_int8_by_hand():
    # absmax 254 -> scale 2; 254/2 = 127, -254/2 = -127, 1/2 and 5/2 are ties: to even, 0 and 2; 6/2 = 3
    codes, scales, hidden = reference.quantize_int8(*one_group(254, -254, 1, 5, 6, size=80))
    assert codes.dtype == torch.int8 and codes[0, :6].tolist() == [127, -127, 0, 2, 3, 0]
    assert scales.dtype == torch.float32 and scales.tolist() == [[2.0]] and hidden.shape == (1, 0)


def test_int8_with_a_shift_by_hand():
    # shift 2 -> values 254, 0, 6, the rest 2
    x, smooth, down = one_group(252, -2, 4)
    codes, scales, _ = reference.quantize_int8(x, smooth, down, 2.0)
    assert codes[0, :4].tolist() == [127, 0, 3, 1] and scales.tolist() == [[2.0]]


def test_codes_use_the_unrounded_scale():
    # absmax 1.796875 / 7 = 0.25669643, stored in bf16 as 0.25585938:
    # 0.384765625 is 1.4989 of the one (code 1) and 1.5038 of the other (code 2)
    x, smooth, down = one_group(1.796875, 0.384765625, dtype=torch.bfloat16)
    codes, scales, _ = reference.quantize_int4(x, smooth, down)
    assert codes[0, :2].tolist() == [7, 1]
    assert scales.tolist() == [[0.255859375]] and round(0.384765625 / 0.255859375) == 2


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_tokens_give_the_bias(name):
    w = layers.random_linear(name, 64, 128, 16)
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    if w.spec.act_shift:
        x -= w.spec.act_shift  # the value whose shifted form is zero
        w = w.__class__(**{**vars(w), "down": torch.zeros_like(w.down)})
    codes, scales, hidden = quantize(x, w)
    assert codes.abs().max() == 0 and scales.float().abs().max() == 0
    assert torch.equal(gemm(codes, scales, hidden, w), w.bias.float().expand(2, 64))


def test_all_equal_group_takes_the_largest_code():
    x, smooth, down = torch.full((1, 64), -0.37), torch.ones(64), torch.zeros(0, 64)
    assert set(reference.quantize_int4(x, smooth, down)[0].flatten().tolist()) == {-7}
    assert set(reference.quantize_int4_unsigned(-x, smooth, down, 0.1)[0].flatten().tolist()) == {15}
    assert set(reference.quantize_nvfp4(x, smooth, down)[0].flatten().tolist()) == {15}


def test_outlier_silences_its_own_group_only():
    x = torch.full((1, 128), 0.5)
    x[0, 0] = 1000.0
    codes, _, _ = reference.quantize_int4(x, torch.ones(128), torch.zeros(0, 128))
    assert codes[0, 0] == 7 and codes[0, 1:64].abs().max() == 0 and codes[0, 64:].min() == 7


def test_smooth_gives_the_outlier_room():
    x, smooth = torch.full((1, 64), 0.5), torch.ones(64)
    x[0, 0], smooth[0] = 1000.0, 2000.0
    assert set(reference.quantize_int4(x, smooth, torch.zeros(0, 64))[0].flatten().tolist()) == {7}


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", W4A4)
def test_a_bad_token_is_not_finite_and_spoils_no_other(name, value):
    w = layers.random_linear(name, 64, 128, 16)
    x = activations(name, 3, 128, torch.bfloat16)
    good = gemm(*quantize(x, w), w)
    x[1, 5] = value
    y = gemm(*quantize(x, w), w)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("name", W4A4)
def test_nan_is_nan_without_a_branch_too(name):
    w = layers.random_linear(name, 64, 128, 0)
    x = activations(name, 1, 128, torch.bfloat16)
    x[0, 5] = torch.nan
    assert gemm(*quantize(x, w), w).isnan().all()


def test_nvfp4_takes_infinity_for_the_largest_number_without_a_branch():
    """As the hardware does: scale and code saturate. A branch of any rank turns it into inf or NaN."""
    w = layers.random_linear("nvfp4", 8, 16, 0)
    x = torch.zeros(1, 16)
    x[0, 0] = torch.inf
    assert gemm(*quantize(x, w), w).isfinite().all()


def test_nvfp4_scale_saturates_and_vanishes():
    # 1e6 / 6 is above 448, so the scale is 448 and the code saturates too; the neighbour is coded with that scale:
    # 2000 / 448 = 4.46 -> 4, code 6. 2^-8 / 6 is below 2^-10: the group is gone
    x, smooth, down = one_group(1e6, 2000, size=32)
    x[0, 16] = 2.0**-8
    codes, scales, _ = reference.quantize_nvfp4(x, smooth, down)
    assert scales.float().tolist() == [[448.0, 0.0]] and codes[0, :2].tolist() == [7, 6]


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("name", W4A4)
def test_smallest_activations_do_not_divide_by_zero(name, dtype):
    kind = layers.DTYPES[dtype]
    x = torch.zeros(1, 64, dtype=kind)
    x[0, 1] = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps  # the smallest number there is
    w = layers.random_linear(name, 8, 64, 0)
    assert gemm(*quantize(x, w), w).isfinite().all()


def test_branch_sees_raw_activations():
    """Neither smooth nor shift may touch what the branch reads."""
    w = layers.random_linear("int4-unsigned", 32, 64, 16)
    x = activations("int4-unsigned", 2, 64, torch.bfloat16)
    assert torch.equal(quantize(x, w)[2], reference.hidden(x, w.down))
