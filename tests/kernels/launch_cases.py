"""Calls of every op that differ in what they launch: shapes around each threshold, dtypes, strides, missing tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdquant_nodes.svdquant.kernels import carrier

BF16, F16, F32, F64, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn
Case = tuple[str, tuple[Any, ...]]
SHAPES = {  # M, N, K, R
    "one-token": (1, 64, 64, 4),
    "last-of-the-small-tile": (64, 4096, 128, 32),
    "first-of-the-large-tile": (65, 4096, 192, 33),
    "large-but-too-few-blocks": (512, 960, 128, 0),
    "just-enough-blocks": (512, 1024, 128, 16),
    "an-image": (4608, 3072, 128, 128),
    "tails": (130, 2050, 64, 129),
    "no-tokens": (0, 64, 64, 4),
    "no-outputs": (3, 0, 64, 4),
}


def cases(arch: int) -> dict[str, Case]:
    """Name -> op of torch.ops.svdquant and its arguments, on a card of compute capability arch / 10."""
    found: dict[str, Case] = {}
    for name, shape in SHAPES.items():
        for dtype in (BF16, F16, F32):
            found |= {f"{name}-{op}-{dtype}": (op, arguments) for op, arguments in _quantizers(shape, dtype)}
            found |= {f"{name}-{op}-{dtype}": (op, arguments) for op, arguments in _products(shape, dtype)}
    return found | _unusual() | _gemvs() | _of_card(arch) | _gelus(arch) | (_hoppers() if arch == 90 else {})


def _quantizers(shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    m, _, k, r = shape
    x, smooth, down = (
        torch.zeros(m, k, dtype=dtype),
        torch.ones(k, dtype=dtype),
        torch.zeros(r, k, dtype=dtype),
    )
    return [
        ("quantize_int4", (x, smooth, down, "mma_s8")),
        ("quantize_int4_unsigned", (x, smooth, down, 0.171875, "mma_s8")),
        ("quantize_nvfp4", (x, smooth, down, "mma_f16")),
        ("quantize_int8", (x, smooth, down, 0.5, "mma_s8")),
    ]


def _products(shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    m, n, k, r = shape
    bias = torch.zeros(n, dtype=dtype) if dtype != F32 else None
    to = torch.zeros(m, n) if dtype == F16 else None, torch.empty(m, n, dtype=dtype)
    int4 = _weights(n, k // 2, k // 64, r, dtype)
    nvfp4 = _weights(n, k // 2, k // 16, r, dtype, scales=E4M3)
    codes, hidden = torch.zeros(m, k, dtype=torch.int8), torch.zeros(m, r)
    scales, fp8 = torch.zeros(m, k // 64, dtype=dtype), torch.zeros(m, k // 16).to(E4M3)
    second = torch.ones(n if dtype == F16 else 1, dtype=dtype)
    bytes_ = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n, 1)
    return [
        ("gemm_int4", (codes, scales, hidden, *int4, bias, *to, "mma_s8")),
        ("gemm_nvfp4", (codes.byte(), fp8, hidden, *nvfp4[:2], second, nvfp4[2], bias, *to, "mma_f16")),
        ("gemm_int8", (codes, torch.zeros(m, 1), hidden, *bytes_, int4[2], bias, *to, "mma_s8")),
    ]


def _weights(
    n: int, columns: int, groups: int, r: int, dtype: torch.dtype, scales: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.zeros(n, columns, dtype=torch.uint8)
    return codes, torch.zeros(n, groups).to(scales or dtype), torch.zeros(n, r, dtype=dtype)


def _unusual() -> dict[str, Case]:
    """Strides, mixed dtypes, other spellings, and what is refused."""
    m, n, k, r = 65, 4096, 128, 16
    x, smooth, down = (
        torch.zeros(m, 2 * k, dtype=BF16),
        torch.ones(k, dtype=BF16),
        torch.zeros(r, k, dtype=BF16),
    )
    wide = x[:, k:]
    codes, hidden, up = torch.zeros(m, k, dtype=torch.int8), torch.zeros(m, r), torch.zeros(n, r, dtype=BF16)
    weights, scales = torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, k // 64, dtype=BF16)
    acts = codes, torch.zeros(m, k // 64, dtype=BF16), hidden
    out = torch.empty(m, 2 * n, dtype=BF16)[:, 5 : 5 + n]
    rest = None, None, out
    weighted = *acts, weights, scales, up
    late = torch.zeros(m * k + 8, dtype=torch.int8)[8:].view(m, k)
    late_weights = torch.zeros(n * k // 2 + 4, dtype=torch.uint8)[4:].view(n, k // 2)
    by_columns = torch.zeros(r, n, dtype=BF16).t()
    return {
        "x-is-a-view": ("quantize_int4", (wide, smooth, down, "mma_s8")),
        "x-by-columns": ("quantize_int4", (x[:, ::2], smooth, down, "mma_s8")),
        "down-of-another-dtype": ("quantize_nvfp4", (wide, smooth, down.half(), "mma_f16")),
        "smooth-of-another-dtype": ("quantize_int8", (wide, smooth.float(), down, 0.0, "mma_s8")),
        "factors-of-64-bits": ("quantize_int4", (wide, smooth.double(), down.double(), "mma_s8")),
        "x-of-8-bits": ("quantize_int4", (wide.to(E4M3), smooth, down, "mma_s8")),
        "no-ranks-of-another-dtype": ("quantize_int4", (wide, smooth, torch.zeros(0, k), "mma_s8")),
        "wide-unsigned": ("gemm_int4", (codes.byte(), *acts[1:], weights, scales, up, *rest, "mma_s8")),
        "up-by-columns": ("gemm_int4", (*acts, weights, scales, by_columns, *rest, "mma_s8")),
        "up-is-a-view": (
            "gemm_int4",
            (*acts, weights, scales, torch.zeros(n, 2 * r)[:, r:], *rest, "mma_s8"),
        ),
        "addend-is-a-view": ("gemm_int4", (*weighted, None, torch.zeros(m, 2 * n)[:, n:], out, "mma_s8")),
        "addend-by-columns": ("gemm_int4", (*weighted, None, torch.zeros(n, m).t(), out, "mma_s8")),
        "bias-of-64-bits": (
            "gemm_int4",
            (*acts, weights, scales, up, torch.zeros(n).double(), None, out, "mma_s8"),
        ),
        "codes-not-aligned": ("gemm_int4", (late, *acts[1:], weights, scales, up, *rest, "mma_s8")),
        "weights-not-aligned": ("gemm_int4", (*acts, late_weights, scales, up, *rest, "mma_s8")),
    }


def _of_card(arch: int) -> dict[str, Case]:
    """The instructions that only some have."""
    found = {}
    for m, n in ((64, 4096), (65, 4096)):
        codes, scales, hidden = torch.zeros(m, 64, dtype=torch.int8), torch.zeros(m, 1), torch.zeros(m, 4)
        out = torch.empty(m, n)
        if arch < 90:
            rest = (scales, hidden, *_weights(n, 32, 1, 4, F16), None, None, out, "mma_sm75")
            found[f"narrow-{m}"] = ("gemm_int4", (codes, *rest))
            found[f"narrow-unsigned-{m}"] = ("gemm_int4", (codes.byte(), *rest))
        if arch // 10 == 12:
            weights, block_scales, up = _weights(n, 32, 4, 4, BF16, scales=E4M3)
            acts = codes.byte(), torch.zeros(m, 4).to(E4M3), hidden
            rest = (weights, block_scales, torch.ones(1), up, None, None, out, "mxf4_sm120")
            found[f"floats-{m}"] = ("gemm_nvfp4", (*acts, *rest))
    return found


def _gemvs() -> dict[str, Case]:
    found = {}
    for m in (0, 1, 2, 4, 5, 8, 9, 24):
        for group in (64, 128):
            n, k, dtype = 100, 256, BF16 if m % 2 else F16
            codes, scales = torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, k // group, dtype=dtype)
            bias = torch.zeros(n, dtype=dtype) if m > 4 else None
            to = torch.zeros(m, 2 * n)[:, n:] if m == 8 else None, torch.empty(m, n, dtype=dtype)
            arguments = (torch.zeros(m, k, dtype=dtype), codes, scales, scales.clone(), bias, *to, "gemv")
            found[f"gemv-{m}-tokens-group-{group}"] = ("gemv_awq", arguments)
    return found


def _gelus(arch: int) -> dict[str, Case]:
    """From one layer's product to the next layer's activations: tiles, walks, types, and what is refused."""
    shapes = {  # M, N, K, R of the next layer
        "one-block-a-row": (5, 64, 64, 8),
        "two-blocks-a-row": (5, 128, 64, 8),
        "parts-of-no-ranks": (5, 128, 64, 0),
        "large-tile": (129, 2048, 128, 33),
        "walks-of-two": (4096, 6144, 64, 4),
        "walks-that-do-not-divide": (8192, 4672, 64, 1),
        "longest-walk": (16384, 12288, 64, 1),
        "of-no-tokens": (0, 64, 64, 4),
        "of-no-outputs": (3, 0, 64, 4),
    }
    integers = ("gelu_s8",) if arch >= 90 else ("gelu_sm75",) if arch < 80 else ("gelu_s4", "gelu_s8")
    floats = ("gelu_mxf4",) if arch // 10 == 12 else ()
    found = {}
    for name, shape in shapes.items():
        for dtype in (BF16, F16, F32):
            for spelling in (*integers, *floats, *(("gelu_f16",) if arch >= 80 else ())):
                shift = 0.0 if dtype == BF16 else 0.171875
                found[f"{spelling}-{name}-{dtype}"] = gelu(shape, dtype, spelling, shift)
    found |= _unusual_gelus(integers[0], codes=0, up=5, bias=6, smooth=7, down=8)
    if arch >= 80:
        places = dict(codes=0, second_scale=5, up=6, bias=7, smooth=8, down=9)
        found |= _unusual_gelus("gelu_f16", **places)
        found["gelu_f16-part-of-a-tile"] = gelu((5, 80, 64, 8), F16, "gelu_f16")
    return found


def _unusual_gelus(spelling: str, **places: int) -> dict[str, Case]:
    """Calls in which one tensor is another; places: where it stands among the arguments."""
    op, whole = gelu((5, 128, 64, 8), F16, spelling)
    late = torch.zeros(5 * 64 + 8, dtype=whole[0].dtype)[8:].view(5, 64)
    changes = {
        "codes-not-aligned": ("codes", late),
        "down-of-another-dtype": ("down", whole[places["down"]].float()),
        "down-by-columns": ("down", torch.zeros(128, 8, dtype=F16).t()),
        "smooth-of-64-bits": ("smooth", torch.ones(128).double()),
        "without-bias": ("bias", None),
        "up-is-a-view": ("up", torch.zeros(128, 32)[:, 16:32]),
        "a-second-scale-a-row": ("second_scale", torch.ones(128)),
    }
    found = {}
    for name, (which, value) in changes.items():
        if which in places:
            at = places[which]
            found[f"{spelling}-{name}"] = op, (*whole[:at], value, *whole[at + 1 :])
    return found


def gelu(shape: tuple[int, ...], dtype: torch.dtype, spelling: str, shift: float = 0.171875) -> Case:
    """A call with the M, N, K and next R of a shape; NVFP4 by spellings that are for it, without a shift."""
    m, n, k, r = shape
    floats = spelling in ("gelu_mxf4", "gelu_f16")
    group, codes, scales = (16, torch.uint8, E4M3) if floats else (64, torch.int8, dtype)
    acts = torch.zeros(m, k, dtype=codes), torch.zeros(m, k // group).to(scales), torch.zeros(m, 16)
    bias, smooth, down = (
        torch.zeros(n, dtype=dtype),
        torch.ones(n, dtype=dtype),
        torch.zeros(r, n, dtype=dtype),
    )
    weight, weight_scales, up = _weights(n, k // 2, k // group, 16, dtype, scales=scales)
    behind = bias, smooth, down
    if floats:
        layer = weight, weight_scales, torch.ones(1), up
        return "gemm_nvfp4_gelu", (*acts, *layer, *behind, dtype, spelling)
    return "gemm_int4_gelu", (*acts, weight, weight_scales, up, *behind, shift, dtype, spelling)


def _hoppers() -> dict[str, Case]:
    """Hopper's own products: every tile that 132 processors choose, operands of either sign, and what is refused."""
    shapes = [
        (1, 64),
        (1, 9216),
        (129, 512),
        (129, 6144),
        (129, 9216),
        (1024, 4096),
        (512, 12288),
        (2048, 2050),
    ]
    found = {}
    for m, n in (*shapes, (1024, 1536), (4608, 3072), (0, 64), (3, 0)):
        for dtype in (BF16, F32):
            acts = torch.zeros(m, 192, dtype=torch.int8), torch.zeros(m, 1), torch.zeros(m, 8)
            weights = torch.zeros(n, 192, dtype=torch.int8), torch.zeros(n, 1), torch.zeros(n, 8, dtype=dtype)
            bias, addend = (torch.zeros(n), torch.zeros(m, n)) if dtype == F32 else (None, None)
            rest = *weights, bias, addend, torch.empty(m, n + 3, dtype=dtype)[:, 3:]
            for spelling in ("wgmma_s8", "wgmma_s8_x2"):
                found[f"{spelling}-{m}-{n}-{dtype}"] = ("gemm_int8", (*acts, *rest, spelling))
            four = *_weights(n, 96, 3, 8, dtype), bias, addend, rest[-1]
            carried = carrier.carried(acts[0], torch.zeros(m, 3))
            for spelling in ("wgmma_e4m3", "wgmma_e4m3_x4"):
                found[f"{spelling}-{m}-{n}-{dtype}"] = ("gemm_int4", (*carried, acts[2], *four, spelling))
    whole = found["wgmma_s8-129-512-torch.bfloat16"][1]
    odd = torch.zeros(129, 200, dtype=torch.int8), *whole[1:3], torch.zeros(512, 200, dtype=torch.int8)
    late = torch.zeros(129 * 192 + 8, dtype=torch.int8)[8:].view(129, 192)
    found["wgmma_s8-k-of-no-16"] = ("gemm_int8", (*odd, *whole[4:]))
    found["wgmma_s8-not-aligned"] = ("gemm_int8", (late, *whole[1:]))
    return found | _carried(found["wgmma_e4m3-129-512-torch.bfloat16"][1])


def _carried(whole: tuple[Any, ...]) -> dict[str, Case]:
    """Activations of exact W4A4 on Hopper, and what its product refuses of them.

    whole  the arguments of a right call
    """
    found = {}
    for name, shape in SHAPES.items():
        for dtype in (BF16, F16, F32):
            for op, (*given, _) in _quantizers(shape, dtype)[:2]:
                found[f"carried-{name}-{op}-{dtype}"] = (op, (*given, "wgmma_e4m3"))
    codes, scales, *rest = whole
    late = torch.zeros(129 * 192 + 8).to(E4M3)[8:].view(129, 192)
    changes = {
        "codes-not-aligned": (late, scales),
        "scales-of-many": (codes, torch.zeros(3, 160)[:, 16:145].T),
        "scales-not-aligned": (codes, torch.zeros(3, 160)[:, 15:144].T),
        "scales-of-uneven-rows": (codes, torch.zeros(3, 129).T),
        "scales-by-tokens": (codes, scales.contiguous()),
        "scales-of-16-bits": (codes, torch.empty_like(scales, dtype=BF16)),
        "codes-of-others": (codes.to(torch.int8), scales),
        "unsigned-codes-of-others": (codes.to(torch.uint8), scales),
    }
    found |= {f"carried-{name}": ("gemm_int4", (*given, *rest)) for name, given in changes.items()}
    found["carried-to-others"] = ("gemm_int4", (*whole[:-1], "mma_s8"))
    return found
