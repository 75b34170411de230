"""Every spelling against the reference (codes and scales: equality) and against the float64 oracle (outputs)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from svdquant_nodes.svdquant.core import awq, reference
from svdquant_nodes.svdquant.core.weights import LinearWeights, QuantSpec
from svdquant_nodes.tests import golden, layers, oracle
from svdquant_nodes.tests.tolerances import assert_close

W4A4 = ["int4", "int4-unsigned", "nvfp4"]
W8A8 = ["int8-of-int4", "int8-of-int4-unsigned"]  # without and with a shift
QUANTIZED = [*W4A4, *W8A8]
SHAPES = {  # M, N, K, R
    "m=0-empty": (0, 64, 128, 16),
    "m=1-gemv": (1, 128, 256, 16),
    "m=1-flux-width": (1, 48, 3072, 32),
    "m=1-n-no-multiple-of-4": (1, 18, 128, 5),
    "m=3-fewer-than-a-tile": (3, 48, 128, 16),
    "m=17-tile-and-one": (17, 48, 128, 16),
    "m=64-whole-tiles": (64, 32, 128, 16),
    "m=259-strip-and-three": (259, 16, 64, 0),
    "k=832-two-chunks-and-a-block": (37, 80, 832, 8),
    "k=64-one-group": (5, 32, 64, 16),
    "k=3072-flux-width": (2, 48, 3072, 32),
    "n=1-one-output": (4, 1, 128, 16),
    "n=17-tail-of-one": (4, 17, 128, 16),
    "n=63-tail-of-fifteen": (9, 63, 192, 16),
    "r=0-no-branch": (5, 48, 192, 0),
    "r=1-odd-rank": (5, 48, 192, 1),
    "r=40-no-power-of-two": (6, 48, 192, 40),
}
NVFP4_SHAPES = {"k=16-one-group": (3, 20, 16, 4), "k=80-no-multiple-of-64": (5, 33, 80, 3)}
INT8_SHAPES = {
    "k=16-half-a-vector": (3, 20, 16, 5),
    "k=80-vectors-and-a-half": (9, 33, 80, 32),
}  # of "int8-of-nvfp4"


def activations(name, m, k, dtype, seed=7):
    """Gaussian tokens; what an unsigned layer sees has been through a GELU."""
    x = layers.random(m, k, seed=seed, dtype=dtype)
    if "unsigned" in name:
        return torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    return x


def quantize(ops, x, w):
    if w.spec.format == "nvfp4":
        return ops.quantize_nvfp4(x, w.smooth, w.down)
    if w.spec.format == "int8":
        return ops.quantize_int8(x, w.smooth, w.down, w.spec.act_shift)
    if w.spec.act_shift:
        return ops.quantize_int4_unsigned(x, w.smooth, w.down, w.spec.act_shift)
    return ops.quantize_int4(x, w.smooth, w.down)


def gemm(ops, codes, scales, hidden, w, **to):
    return getattr(ops, f"gemm_{w.spec.format}")(codes, scales, hidden, w, **to)


def same_bits(got, want):
    """Dtype, shape and every number; NaN is NaN, whatever its payload."""
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got.float().cpu(), want.float(), rtol=0, atol=0, equal_nan=True)


def judge_quantizer(spelled, x, w):
    codes, scales, hidden = quantize(spelled.ops, spelled.here(x), spelled.weights(w))
    want_codes, want_scales = spelled.written(*quantize(reference, x, w)[:2])
    same_bits(codes, want_codes)
    same_bits(scales, want_scales)
    assert hidden.dtype == torch.float32
    assert_close(hidden, oracle.values(x) @ oracle.values(w.down).T, spelled.tolerance)


def judge_gemm(spelled, x, w):
    """On the reference's own codes, so that only the product is judged."""
    quantized = [spelled.here(t) for t in quantize(reference, x, w)]
    y = gemm(spelled.ops, *quantized, spelled.weights(w))
    assert y.dtype == torch.float32 and y.is_contiguous()
    assert_close(y, layers.forward(x, w), spelled.tolerance)


CASES = [(name, shape) for name in QUANTIZED for shape in SHAPES]
CASES += [("nvfp4", shape) for shape in NVFP4_SHAPES] + [("int8-of-nvfp4", shape) for shape in INT8_SHAPES]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_shapes(spelled, name, shape):
    m, n, k, r = (SHAPES | NVFP4_SHAPES | INT8_SHAPES)[shape]
    w, x = layers.random_linear(name, n, k, r), activations(name, m, k, torch.bfloat16)
    judge_quantizer(spelled, x, w)
    judge_gemm(spelled, x, w)


@pytest.mark.parametrize("acts", layers.DTYPES)
@pytest.mark.parametrize("stored", layers.DTYPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_dtypes_of_activations_and_weights(spelled, name, stored, acts):
    w = layers.random_linear(name, 40, 128, 16, dtype=layers.DTYPES[stored])
    x = activations(name, 7, 128, layers.DTYPES[acts])
    judge_quantizer(spelled, x, w)
    judge_gemm(spelled, x, w)


def test_double_precision_weights_are_read(spelled):
    w = layers.random_linear("int4", 40, 128, 16, dtype=torch.float64)
    judge_quantizer(spelled, activations("int4", 3, 128, torch.float32), w)
    judge_gemm(spelled, activations("int4", 3, 128, torch.float32), w)


# ---- codes: all the values that rounding can meet ----


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_of_many_magnitudes(spelled, name, dtype):
    """Groups from the smallest to the largest numbers of a dtype: subnormal, overflowing and saturating scales."""
    kind = layers.DTYPES[dtype]
    steps = (
        torch.linspace(-45, 38, 84).unsqueeze(1)
        if dtype != "fp16"
        else torch.linspace(-8, 4, 84).unsqueeze(1)
    )
    x = (layers.random(84, 192, seed=3).clamp(-3, 3) * 10.0**steps).to(kind)
    w = layers.random_linear(name, 8, 192, 0, dtype=kind)
    codes, scales, _ = quantize(spelled.ops, spelled.here(x), spelled.weights(w))
    want_codes, want_scales = spelled.written(*quantize(reference, x, w)[:2])
    same_bits(scales, want_scales)
    judged = want_scales.float().isfinite().all(1)
    if name == "nvfp4" and spelled.device.type != "cpu":
        # below, a zero times the infinite reciprocal of a subnormal scale is NaN, whose sign each processor chooses
        judged &= x.float().abs().amax(1) > 1e-36
    assert codes.dtype == want_codes.dtype
    same_bits(codes.float()[judged.to(codes.device)], want_codes.float()[judged])
    assert judged.sum() > 60


@pytest.mark.parametrize("dtype", layers.DTYPES)
def test_every_tie_of_int4(spelled, dtype):
    """Quotients that end in exactly one half: absmax 14 gives scale 2, odd numbers are the ties."""
    x = torch.zeros(2, 64, dtype=layers.DTYPES[dtype])
    x[:, 0] = 14
    x[0, 1:30] = torch.arange(-14, 15)
    x[1, 1:60] = torch.arange(59) / 4 - 7
    one, none = torch.ones(64, dtype=x.dtype), torch.zeros(0, 64, dtype=x.dtype)
    got = spelled.ops.quantize_int4(*map(spelled.here, (x, one, none)))
    assert torch.equal(got[0].float().cpu(), reference.quantize_int4(x, one, none)[0].float())
    assert got[0][0, 15:19].tolist() == [0, 0, 1, 2]  # 0/2, 1/2 to even, 2/2, 3/2 to even


def test_every_tie_of_e2m1(spelled):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.zeros(3, 16)
    x[:, 0] = 6.0
    x[0, 1:8], x[0, 8:15], x[0, 15] = ties, -ties, -0.0
    x[1, 1:8], x[1, 8:15] = ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(9.0))
    x[2] = -x[1]
    one, none = torch.ones(16), torch.zeros(0, 16)
    got = spelled.ops.quantize_nvfp4(*map(spelled.here, (x, one, none)))
    assert torch.equal(got[0].cpu(), reference.quantize_nvfp4(x, one, none)[0])
    assert got[0][0].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 8]


def test_every_e4m3_scale(spelled):
    """Activation scales around each boundary of e4m3: zero, subnormal, normal, saturated."""
    alphas = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = (alphas[1:] + alphas[:-1]) / 2
    x = torch.cat([alphas, edges, edges * (1 + 2**-20), edges * (1 - 2**-20), torch.tensor([1e3, 1e9])])
    x = (x * 6).unsqueeze(1).expand(-1, 16).contiguous()
    one, none = torch.ones(16), torch.zeros(0, 16)
    got, want = (
        spelled.ops.quantize_nvfp4(*map(spelled.here, (x, one, none))),
        reference.quantize_nvfp4(x, one, none),
    )
    same_bits(got[1], want[1])
    assert torch.equal(got[0].cpu(), want[0])


# ---- products: all the codes there are ----


@pytest.mark.parametrize("name", W4A4)
def test_extreme_codes_do_not_overflow(spelled, name):
    """Largest against largest and against smallest, -8 included, which files may hold and sums must bear."""
    w = layers.random_linear(name, 32, 256, 16)
    extreme = torch.tensor([0x88, 0x77, 0xFF, 0x80], dtype=torch.uint8).repeat(8, 1).reshape(32, 1)
    w = dataclasses.replace(w, codes=extreme.expand(-1, 128).contiguous())
    low, high = {"int4": (-8, 7), "int4-unsigned": (0, 15), "nvfp4": (15, 7)}[name]
    codes = torch.tensor([[low], [high]]).expand(-1, 256).to(torch.int8 if name == "int4" else torch.uint8)
    group = w.spec.group
    scales = torch.ones(2, 256 // group).to(torch.float8_e4m3fn if name == "nvfp4" else torch.bfloat16)
    hidden = torch.zeros(2, 16)
    y = gemm(spelled.ops, *map(spelled.here, (codes, scales, hidden)), spelled.weights(w))
    acts = oracle.act_values(codes.long().numpy(), oracle.values(scales), e2m1=name == "nvfp4")
    assert_close(y, acts @ layers.main_weight(w).T + oracle.values(w.bias), spelled.tolerance)


@pytest.mark.parametrize("name", W4A4)
def test_every_pair_of_codes(spelled, name):
    """All 16 weight codes in every place of a group, against one activation at a time."""
    w = layers.random_linear(name, 16, 64, 0)
    w = dataclasses.replace(
        w, codes=torch.arange(16, dtype=torch.uint8).mul(17).unsqueeze(1).expand(-1, 32).contiguous()
    )
    codes = torch.eye(64).to(torch.uint8 if name == "nvfp4" else torch.int8) * 7
    scales = torch.ones(64, 64 // w.spec.group).to(torch.float8_e4m3fn if name == "nvfp4" else torch.bfloat16)
    hidden = torch.zeros(64, 0)
    y = gemm(spelled.ops, *map(spelled.here, (codes, scales, hidden)), spelled.weights(w))
    acts = oracle.act_values(codes.long().numpy(), oracle.values(scales), e2m1=name == "nvfp4")
    assert_close(y, acts @ layers.main_weight(w).T + oracle.values(w.bias), spelled.tolerance)


def test_second_scale_of_the_tensor_or_of_each_row(spelled):
    w = layers.random_linear("nvfp4", 40, 64, 4)
    rows = torch.exp2(layers.random(40, seed=5)).to(torch.bfloat16)
    for second in (w.second_scale, rows):
        w = dataclasses.replace(w, second_scale=second)
        judge_gemm(spelled, activations("nvfp4", 3, 64, torch.bfloat16), w)


def test_every_e4m3_weight_scale(spelled):
    """All 254 numbers of e4m3 as weight scales."""
    w = layers.random_linear("nvfp4", 16, 256, 0)
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    codes[codes % 128 == 127] = 0
    judge_gemm(
        spelled,
        activations("nvfp4", 2, 256, torch.bfloat16),
        dataclasses.replace(w, scales=codes.view(torch.float8_e4m3fn)),
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_layer_without_bias(spelled, name):
    w = dataclasses.replace(layers.random_linear(name, 40, 64, 4), bias=None)
    judge_gemm(spelled, activations(name, 3, 64, torch.bfloat16), w)


# ---- outputs of 16 bits: the fp32 ones, rounded once ----


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("m", [1, 9, 300], ids="m={}".format)
@pytest.mark.parametrize("name", QUANTIZED)
def test_output_is_rounded_once(spelled, name, m, dtype):
    w = layers.random_linear(name, 63 if m > 1 else 64, 192, 16)
    quantized = [spelled.here(t) for t in quantize(reference, activations(name, m, 192, torch.bfloat16), w)]
    exact = gemm(spelled.ops, *quantized, spelled.weights(w))
    got = gemm(spelled.ops, *quantized, spelled.weights(w), dtype=layers.DTYPES[dtype])
    assert torch.equal(got, exact.to(layers.DTYPES[dtype]))


@pytest.mark.parametrize("name", QUANTIZED)
def test_fp16_output_saturates(spelled, name):
    w = layers.random_linear(name, 40, 64, 4, dtype=torch.float32)
    w.bias[:3] = torch.tensor([1e6, -1e6, torch.nan])
    quantized = [spelled.here(t) for t in quantize(reference, activations(name, 5, 64, torch.float32), w)]
    y = gemm(spelled.ops, *quantized, spelled.weights(w), dtype=torch.float16)
    assert (y[:, 0] == 65504).all() and (y[:, 1] == -65504).all() and y[:, 2].isnan().all()


# ---- zeros, outliers, NaN ----


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_group(spelled, name):
    w, x = layers.random_linear(name, 32, 192, 16), activations(name, 3, 192, torch.bfloat16)
    x[:, 64:128] = -w.spec.act_shift
    judge_quantizer(spelled, x, w)
    judge_gemm(spelled, x, w)


@pytest.mark.parametrize("name", QUANTIZED)
def test_outlier(spelled, name):
    w, x = layers.random_linear(name, 32, 192, 16), activations(name, 3, 192, torch.bfloat16)
    x[1, 70] = 3000.0
    judge_quantizer(spelled, x, w)
    judge_gemm(spelled, x, w)


@pytest.mark.parametrize("rank", [0, 16], ids=["alone", "with-branch"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_bad_token_is_bad_where_the_reference_says_and_spoils_no_other(spelled, name, value, rank):
    w, x = layers.random_linear(name, 40, 128, rank), activations(name, 19, 128, torch.bfloat16)
    here = spelled.weights(w)
    good = gemm(spelled.ops, *quantize(spelled.ops, spelled.here(x), here), here)
    x[5, 70] = value
    y = gemm(spelled.ops, *quantize(spelled.ops, spelled.here(x), here), here)
    want = gemm(reference, *quantize(reference, x, w), w)
    assert torch.equal(y[5].isfinite().cpu(), want[5].isfinite())
    others = torch.arange(19) != 5
    assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("name", QUANTIZED)
def test_nan_in_smooth_reaches_the_output(spelled, name):
    w, x = layers.random_linear(name, 16, 128, 0), activations(name, 2, 128, torch.bfloat16)
    w.smooth[3] = torch.nan
    here = spelled.weights(w)
    assert gemm(spelled.ops, *quantize(spelled.ops, spelled.here(x), here), here).isnan().all()


# ---- AWQ ----

AWQ_SHAPES = {  # M, N, K
    "m=0-empty": (0, 32, 64),
    "m=1-modulation": (1, 96, 3072),
    "m=2-batch": (2, 40, 128),
    "m=8-most-of-a-gemv": (8, 33, 192),
    "m=21-more": (21, 17, 128),
    "n=1-one-output": (3, 1, 64),
}


@pytest.mark.parametrize("acts", layers.DTYPES)
@pytest.mark.parametrize("shape", AWQ_SHAPES)
def test_awq(spelled, shape, acts):
    m, n, k = AWQ_SHAPES[shape]
    x, w = layers.random(m, k, seed=3, dtype=layers.DTYPES[acts]), layers.random_linear("awq", n, k)
    y = spelled.ops.gemv_awq(spelled.here(x), spelled.weights(w))
    assert y.dtype == torch.float32
    assert_close(y, layers.forward(x, w), "fp32_sum")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = spelled.ops.gemv_awq(spelled.here(x), spelled.weights(w), dtype=dtype)
        assert torch.equal(rounded, y.to(dtype))


def test_awq_of_positive_activations_keeps_its_precision(spelled):
    """What a SiLU gives: scale * sum(x * code) and zero * sum(x) nearly cancel, and must not do so in fp32 totals."""
    x = torch.nn.functional.silu(layers.random(1, 3072, seed=3) + 2).clamp(min=0.5)
    w = dataclasses.replace(layers.random_linear("awq", 64, 3072, dtype=torch.float32), bias=None)
    assert_close(spelled.ops.gemv_awq(spelled.here(x), spelled.weights(w)), layers.forward(x, w), "fp32_sum")


def test_awq_takes_all_codes_and_groups_of_128(spelled):
    """As a T5 encoder has: zeros of their own, codes 0 to 15."""
    codes = torch.arange(20 * 128, dtype=torch.int64).mul(37).remainder(256).to(torch.uint8).reshape(20, 128)
    scales, zeros = layers.random(20, 2, seed=1).abs() + 0.1, layers.random(20, 2, seed=2)
    w = LinearWeights(QuantSpec("awq", 128), codes, scales, zeros=zeros)
    x = layers.random(3, 256, seed=3)
    want = oracle.values(x) @ oracle.values(awq.dequantize_weight(codes, scales, zeros)).T
    assert_close(spelled.ops.gemv_awq(spelled.here(x), spelled.weights(w)), want, "fp32_sum")


def test_awq_nan_stays_with_its_token(spelled):
    x, w = layers.random(6, 128, seed=3), layers.random_linear("awq", 24, 128)
    x[4, 100] = torch.nan
    y = spelled.ops.gemv_awq(spelled.here(x), spelled.weights(w))
    assert y[4].isnan().all() and y[[0, 1, 2, 3, 5]].isfinite().all()


# ---- golden forwards ----

FORWARDS = {  # weights, input, codes, scales, exact output
    "A-signed": (lambda: golden.int4_linear("c0"), "A", "x", "qa", "sa", "y_exact"),
    "B-fc1": (lambda: golden.int4_linear("c1"), "B", "x", "fc1_qa", "fc1_sa", "fc1_exact"),
    "B-fc2-unsigned": (lambda: golden.int4_linear("c3"), "B", "gelu", "fc2_qa", "fc2_sa", "y_exact"),
    "C_f0-tensor-scale": (lambda: golden.nvfp4_linear("f0"), "C_f0", "x", "code", "sa", "y_exact"),
    "C_f1-channel-scale": (lambda: golden.nvfp4_linear("f1"), "C_f1", "x", "code", "sa", "y_exact"),
}


@pytest.mark.parametrize(("make", "prefix", "x", "qa", "sa", "exact"), FORWARDS.values(), ids=FORWARDS)
def test_golden_forward(spelled, make, prefix, x, qa, sa, exact):
    t, w = golden.case("forward", prefix), spelled.weights(make())
    codes, scales, hidden = quantize(spelled.ops, spelled.here(t[x]), w)
    assert torch.equal(codes.cpu().to(t[qa].dtype), t[qa])
    assert torch.equal(scales.float().cpu(), t[sa].float())
    assert_close(gemm(spelled.ops, codes, scales, hidden, w), t[exact], spelled.tolerance)
