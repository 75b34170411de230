from __future__ import annotations

import pytest

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.kernels import select
from svdquant_nodes.svdquant.kernels.select import Device, Request, choose

X86 = Device("cpu", features=frozenset({"avx512", "avx2", "portable"}))
OLD_X86 = Device("cpu", features=frozenset({"portable"}))
ARM = Device("cpu", features=frozenset({"neon", "portable"}))
NO_COMPILER = Device("cpu", missing="no C++ compiler named g++ was found")
TURING, AMPERE, ADA, H100, BLACKWELL = (
    Device("cuda", capability=capability) for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0))
)
WITHOUT_CLUSTERS = Device("cuda", capability=(9, 0), distrusted=frozenset({"wgmma_e4m3_x4", "wgmma_s8_x2"}))
UNPROVEN = Device("cuda", capability=(9, 0), distrusted=frozenset({"wgmma_e4m3_x4", "wgmma_e4m3"}))
RTX50 = Device("cuda", features=frozenset({"block_scaled"}), capability=(12, 0))
B200 = Device("cuda", features=frozenset({"block_scaled"}), capability=(10, 0))
ALONE = Device("cuda", frozenset({"block_scaled"}), (12, 0), missing="no compiler")  # no library of ours
BROKEN = Device("cuda", capability=(8, 9), missing="the self-test failed")
INT4, INT8 = Request("gemm_int4", "bfloat16"), Request("gemm_int8", "bfloat16")
GELU, GELU_FLOATS = Request("gemm_int4_gelu", "bfloat16"), Request("gemm_nvfp4_gelu", "bfloat16")

CHOICES = {  # device, request, spelling
    "best-of-three": (X86, INT4, "avx512"),
    "old-processor": (OLD_X86, INT4, "reference"),
    "plain-on-request": (OLD_X86, Request("gemm_int4", "bfloat16", wanted="portable"), "portable"),
    "arm": (ARM, INT4, "neon"),
    "asked-by-name": (X86, Request("gemm_int4", "bfloat16", wanted="avx2"), "avx2"),
    "asked-for-what-is-not-here": (ARM, Request("gemm_int4", "bfloat16", wanted="avx2"), "reference"),
    "off": (X86, Request("gemm_int4", "bfloat16", wanted="off"), "reference"),
    "fp16": (X86, Request("quantize_int4", "float16"), "avx512"),
    "fp64": (X86, Request("quantize_int4", "float64"), "reference"),
    "int4-of-group-128": (X86, Request("gemm_int4", "bfloat16", 128), "reference"),
    "awq-of-group-128": (X86, Request("gemv_awq", "bfloat16", 128), "avx512"),
    "awq-of-a-prompt": (X86, Request("gemv_awq", "float32", tokens=256), "reference"),
    "awq-of-a-prompt-on-a-gpu": (H100, Request("gemv_awq", "float32", tokens=256), "weight_only"),
    "awq-of-a-prompt-by-name": (X86, Request("gemv_awq", "float32", tokens=256, wanted="avx2"), "avx2"),
    "awq-of-group-32": (X86, Request("gemv_awq", "bfloat16", 32), "reference"),
    "nvfp4-of-group-16": (X86, Request("gemm_nvfp4", "bfloat16", 16), "avx512"),
    "nvfp4-of-group-64": (X86, Request("gemm_nvfp4", "bfloat16", 64), "reference"),
    "no-library": (NO_COMPILER, INT4, "reference"),
    "turing": (TURING, INT4, "mma_sm75"),
    "ampere": (AMPERE, INT4, "mma_s4"),
    "ada": (ADA, INT4, "mma_s4"),
    "ada-by-eight-bits": (ADA, Request("gemm_int4", "bfloat16", wanted="mma_s8"), "mma_s8"),
    "hopper": (H100, INT4, "wgmma_e4m3_x4"),
    "hopper-where-clusters-failed": (WITHOUT_CLUSTERS, INT4, "wgmma_e4m3"),
    "hopper-that-failed": (UNPROVEN, INT4, "mma_s8"),
    "hopper-of-few-tokens": (H100, Request("gemm_int4", "bfloat16", tokens=128), "mma_s8"),
    "hopper-of-more": (H100, Request("quantize_int4", "bfloat16", tokens=129), "wgmma_e4m3_x4"),
    "hopper-of-few-by-name": (
        H100,
        Request("gemm_int4", "bfloat16", tokens=1, wanted="wgmma_e4m3"),
        "wgmma_e4m3",
    ),
    "blackwell": (BLACKWELL, INT4, "mma_s8"),
    "nvfp4-on-turing": (TURING, Request("quantize_nvfp4", "float16"), "mma_f16"),
    "nvfp4-on-ada": (ADA, Request("gemm_nvfp4", "bfloat16"), "mma_f16"),
    "nvfp4-on-b200": (Device("cuda", capability=(10, 0)), Request("gemm_nvfp4", "bfloat16"), "mma_f16"),
    "nvfp4-on-blackwell": (BLACKWELL, Request("gemm_nvfp4", "bfloat16"), "mxf4_sm120"),
    "nvfp4-on-spark": (Device("cuda", capability=(12, 1)), Request("gemm_nvfp4", "bfloat16"), "mxf4_sm120"),
    "nvfp4-on-blackwell-that-failed": (
        Device("cuda", capability=(12, 0), distrusted=frozenset({"mxf4_sm120"})),
        Request("gemm_nvfp4", "bfloat16"),
        "mma_f16",
    ),
    "nvfp4-with-torch-beside": (RTX50, Request("gemm_nvfp4", "bfloat16"), "mxf4_sm120"),
    "nvfp4-by-torch": (B200, Request("gemm_nvfp4", "bfloat16"), "torch_scaled"),
    "nvfp4-by-torch-quantized-by-us": (B200, Request("quantize_nvfp4", "bfloat16"), "mma_f16"),
    "nvfp4-by-torch-by-name": (
        RTX50,
        Request("quantize_nvfp4", "bfloat16", wanted="torch_scaled"),
        "torch_scaled",
    ),
    "nvfp4-without-our-library": (ALONE, Request("gemm_nvfp4", "bfloat16"), "torch_scaled"),
    "nvfp4-quantized-without-our-library": (ALONE, Request("quantize_nvfp4", "bfloat16"), "torch_scaled"),
    "nvfp4-off": (ALONE, Request("gemm_nvfp4", "bfloat16", wanted="off"), "reference"),
    "int4-without-our-library": (ALONE, INT4, "weight_only"),
    "nvfp4-by-torch-on-ada": (
        Device("cuda", frozenset({"block_scaled"}), (8, 9)),
        Request("gemm_nvfp4", "bfloat16"),
        "mma_f16",
    ),
    "awq-on-a-gpu": (ADA, Request("gemv_awq", "bfloat16"), "gemv"),
    "fp32-on-a-gpu": (ADA, Request("quantize_int4", "float32"), "mma_s4"),
    "int8-on-turing": (TURING, INT8, "mma_s8"),
    "int8-on-ampere": (AMPERE, INT8, "mma_s8"),
    "int8-on-hopper": (H100, INT8, "wgmma_s8_x2"),
    "int8-on-hopper-where-clusters-failed": (WITHOUT_CLUSTERS, INT8, "wgmma_s8"),
    "int8-on-hopper-by-mma": (H100, Request("gemm_int8", "bfloat16", wanted="mma_s8"), "mma_s8"),
    "int8-on-a-cpu": (X86, INT8, "avx512"),
    "int8-on-arm": (ARM, Request("quantize_int8", "bfloat16"), "neon"),
    "int8-of-fp64": (X86, Request("quantize_int8", "float64"), "reference"),
    "gelu-on-turing": (TURING, Request("gemm_int4_gelu", "float16"), "gelu_sm75"),
    "gelu-of-bf16-on-turing": (TURING, Request("gemm_int4_gelu", "bfloat16"), "apart"),
    "gelu-on-ampere": (AMPERE, GELU, "gelu_s4"),
    "gelu-of-fp32": (AMPERE, Request("gemm_int4_gelu", "float32"), "apart"),
    "gelu-by-eight-bits": (ADA, Request("gemm_int4_gelu", "bfloat16", wanted="mma_s8"), "gelu_s8"),
    "gelu-by-name": (ADA, Request("gemm_int4_gelu", "bfloat16", wanted="gelu_s8"), "gelu_s8"),
    "gelu-that-failed": (
        Device("cuda", capability=(8, 9), distrusted=frozenset({"gelu_s4"})),
        GELU,
        "apart",
    ),
    "gelu-behind-a-product-that-failed": (
        Device("cuda", capability=(8, 9), distrusted=frozenset({"mma_s4"})),
        GELU,
        "gelu_s8",
    ),
    "gelu-on-hopper": (H100, GELU, "apart"),
    "gelu-on-hopper-of-few-tokens": (H100, Request("gemm_int4_gelu", "bfloat16", tokens=128), "gelu_s8"),
    "gelu-on-hopper-that-failed": (UNPROVEN, GELU, "gelu_s8"),
    "gelu-on-blackwell": (BLACKWELL, GELU, "gelu_s8"),
    "gelu-on-a-cpu": (X86, GELU, "apart"),
    "gelu-off": (ADA, Request("gemm_int4_gelu", "bfloat16", wanted="off"), "apart"),
    "gelu-without-kernels": (BROKEN, GELU, "apart"),
    "nvfp4-gelu-on-rtx-50": (RTX50, GELU_FLOATS, "gelu_mxf4"),
    "nvfp4-gelu-on-rtx-50-of-fp16": (RTX50, Request("gemm_nvfp4_gelu", "float16"), "gelu_mxf4"),
    "nvfp4-gelu-on-rtx-50-of-fp32": (RTX50, Request("gemm_nvfp4_gelu", "float32"), "apart"),
    "nvfp4-gelu-beside-torch": (B200, GELU_FLOATS, "apart"),
    "nvfp4-gelu-without-our-library": (ALONE, GELU_FLOATS, "apart"),
    "nvfp4-gelu-behind-a-product-that-failed": (
        Device("cuda", capability=(12, 0), distrusted=frozenset({"mxf4_sm120"})),
        GELU_FLOATS,
        "gelu_f16",
    ),
    "nvfp4-gelu-that-failed": (
        Device("cuda", capability=(12, 0), distrusted=frozenset({"gelu_mxf4"})),
        GELU_FLOATS,
        "apart",
    ),
    "nvfp4-gelu-on-ada": (ADA, GELU_FLOATS, "gelu_f16"),
    "nvfp4-gelu-on-hopper": (H100, GELU_FLOATS, "gelu_f16"),
    "nvfp4-gelu-on-turing": (TURING, Request("gemm_nvfp4_gelu", "float16"), "apart"),
    "nvfp4-gelu-by-name": (RTX50, Request("gemm_nvfp4_gelu", "bfloat16", wanted="gelu_f16"), "gelu_f16"),
    "nvfp4-gelu-of-group-32": (RTX50, Request("gemm_nvfp4_gelu", "bfloat16", 32), "apart"),
    "gpu-that-may-not": (BROKEN, INT4, "weight_only"),
    "device-without-kernels": (Device("mps"), INT4, "weight_only"),
    "device-without-kernels-exact": (
        Device("mps"),
        Request("gemm_int4", "bfloat16", wanted="off"),
        "reference",
    ),
    "weight-only-by-name": (X86, Request("gemm_int4", "bfloat16", wanted="weight_only"), "weight_only"),
}


@pytest.mark.parametrize(("device", "request_", "spelling"), CHOICES.values(), ids=CHOICES)
def test_choice(device, request_, spelling):
    assert choose(device, request_).spelling == spelling


@pytest.mark.parametrize("wanted", ["auto", "off", "mma_s8", "wgmma_e4m3", "wgmma_e4m3_x4", "gelu_s8"])
@pytest.mark.parametrize("tokens", [1, 128, 129, 4608])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "device", [H100, WITHOUT_CLUSTERS, UNPROVEN, ADA], ids=["h100", "alone", "none", "ada"]
)
def test_who_quantizes_multiplies(device, dtype, tokens, wanted):
    """A product knows its activations by the scales, which are fp32 beside carried integers."""
    near = select.about("gemm_int4", tokens)
    first = choose(device, Request("quantize_int4", dtype, tokens=near, wanted=wanted)).spelling
    carried = "float32" if first in select.E4M3 else dtype
    second = choose(device, Request("gemm_int4", carried, tokens=near, wanted=wanted)).spelling
    assert first == second


REASONS = {  # device, request, spelling, reason
    "feature": (ARM, INT4, "avx2", "this processor has no avx2"),
    "library": (NO_COMPILER, INT4, "avx2", "no C++ compiler named g++ was found"),
    "dtype": (X86, Request("quantize_int4", "float64"), "avx2", "activations are float64"),
    "group": (X86, Request("gemm_int4", "bfloat16", 128), "avx2", "weight groups of 128 instead of 64"),
    "off": (X86, Request("gemm_int4", "bfloat16", wanted="off"), "avx2", "SVDQUANT_KERNELS is off"),
    "wanted": (
        X86,
        Request("gemm_int4", "bfloat16", wanted="portable"),
        "avx2",
        "SVDQUANT_KERNELS asks for portable",
    ),
    "device": (
        Device("mps"),
        INT4,
        "kernels",
        "none is written for gemm_int4 on mps",
    ),
    "capability": (UNPROVEN, INT4, "mma_s4", "mma.s4 needs compute capability 8.0 to 8.9, this is 9.0"),
    "one-capability": (UNPROVEN, INT4, "mma_sm75", "mma.m8n8k32 needs compute capability 7.5, this is 9.0"),
    "few-tokens": (
        H100,
        Request("gemm_int4", "bfloat16", tokens=128),
        "wgmma_e4m3_x4",
        "fewer than 129 tokens",
    ),
    "self-test": (UNPROVEN, INT4, "wgmma_e4m3", "it failed the self-test"),
    "on-request": (OLD_X86, INT4, "portable", "slower than torch for a whole picture"),
    "old-torch": (
        BLACKWELL,
        Request("gemm_nvfp4", "bfloat16", wanted="mma_f16"),
        "torch_scaled",
        "this torch has no block-scaled product",
    ),
    "fused-beside-another": (H100, GELU, "gelu_s8", "gemm_int4 is computed by wgmma_e4m3_x4"),
    "fused-beside-torch": (B200, GELU_FLOATS, "gelu_f16", "gemm_nvfp4 is computed by torch_scaled"),
    "fused-dtype": (TURING, GELU, "gelu_sm75", "activations are bfloat16"),
    "fused-by-another-name": (
        ADA,
        Request("gemm_int4_gelu", "bfloat16", wanted="mma_s8"),
        "gelu_s4",
        "SVDQUANT_KERNELS asks for mma_s8",
    ),
    "fused-on-a-cpu": (X86, GELU, "kernels", "none is written for gemm_int4_gelu on cpu"),
    "prompt": (X86, Request("gemv_awq", "float32", tokens=25), "avx2", "more than 24 tokens"),
    "prompt-on-a-gpu": (ADA, Request("gemv_awq", "bfloat16", tokens=25), "gemv", "more than 24 tokens"),
}


@pytest.mark.parametrize(("device", "request_", "spelling", "reason"), REASONS.values(), ids=REASONS)
def test_reason(device, request_, spelling, reason):
    assert reason in choose(device, request_).against[spelling]


UNFIT = {  # capability, name, reason
    "pascal": ((6, 1), "NVIDIA GeForce GTX 1080", "compute capability 6.1 is below 7.5"),
    "gtx-16": ((7, 5), "NVIDIA GeForce GTX 1660 SUPER", "NVIDIA GeForce GTX 1660 SUPER has no tensor cores"),
    "mobile": ((7, 5), "NVIDIA GeForce MX450", "NVIDIA GeForce MX450 has no tensor cores"),
    "workstation": ((7, 5), "NVIDIA T1000 8GB", "NVIDIA T1000 8GB has no tensor cores"),
    "rtx-20": ((7, 5), "NVIDIA GeForce RTX 2060", ""),
    "tesla": ((7, 5), "Tesla T4", ""),
    "ada": ((8, 9), "NVIDIA RTX 2000 Ada Generation", ""),
}


@pytest.mark.parametrize(("capability", "name", "reason"), UNFIT.values(), ids=UNFIT)
def test_gpus_that_none_of_it_is_for(capability, name, reason):
    assert select.unfit(capability, name) == reason


EIGHT_BITS_PAY = {  # device, SVDQUANT_KERNELS, answer
    "a100": (AMPERE, "auto", True),
    "h100": (H100, "auto", True),
    "h100-by-mma": (H100, "mma_s8", True),
    "b200": (Device("cuda", capability=(10, 0)), "auto", True),
    "turing": (TURING, "auto", False),
    "rtx-30": (Device("cuda", capability=(8, 6)), "auto", False),
    "rtx-40": (ADA, "auto", False),
    "rtx-50": (BLACKWELL, "auto", False),
    "cpu": (X86, "auto", False),
    "without-kernels": (H100, "off", False),
    "by-another-spelling": (AMPERE, "mma_s4", False),
    "failed-its-self-test": (
        Device("cuda", capability=(9, 0), missing="the self-test failed"),
        "auto",
        False,
    ),
}


@pytest.mark.parametrize(("device", "wanted", "answer"), EIGHT_BITS_PAY.values(), ids=EIGHT_BITS_PAY)
def test_where_eight_bits_pay(device, wanted, answer):
    assert select.eight_bits_pay(device, wanted) is answer


def test_without_a_library_torch_alone_is_tried():
    assert [row.name for row in select.to_try(ALONE)] == ["torch_scaled"]
    assert select.to_try(BROKEN) == [] and select.to_try(NO_COMPILER) == []
    assert [row.name for row in select.to_try(B200)] == [
        "torch_scaled",
        "mma_s8",
        "mma_f16",
        "gemv",
        "gelu_s8",
        "gelu_f16",
    ]


def test_nothing_against_what_is_chosen():
    assert choose(X86, INT4).against == {}
    assert set(choose(OLD_X86, INT4).against) == {"avx512", "avx2", "neon", "portable"}


def test_a_missing_library_is_the_only_reason_given_for_it():
    """What the processor lacks is unknown without the library, so nothing is claimed about it."""
    assert choose(NO_COMPILER, INT4).against["avx2"] == (NO_COMPILER.missing,)


def test_sentence():
    assert choose(X86, INT4).sentence() == "avx512"
    assert choose(ARM, INT4).sentence() == (
        "neon (not avx512: this processor has no avx512; not avx2: this processor has no avx2)"
    )


def test_every_op_is_one_of_the_reference():
    assert all(callable(getattr(reference, op)) for op in select.OPS)
    assert {op for row in select.SPELLINGS for op in row.ops} == set(select.OPS)


def test_a_fused_row_stands_beside_a_product():
    rows = {row.name: row for row in select.SPELLINGS}
    fused = [row for row in select.SPELLINGS if set(row.ops) & set(select.FUSED_OPS)]
    assert all(row.ops[0].removesuffix("_gelu") in rows[row.beside].ops for row in fused)
    assert not any(row.beside for row in select.SPELLINGS if row not in fused)


def test_names_are_unique_and_differ_from_the_settings():
    names = [row.name for row in select.SPELLINGS]
    assert len(names) == len(set(names)) and not set(names) & {"auto", "off", select.REFERENCE}
