"""The ops of csrc/ops.cpp for GPUs in Python: check, allocate, launch kernels that NVRTC compiled.

Where there is no C++ compiler these stand behind the same torch.ops.svdquant, with the same schemas, checks and words.
Nothing waits for the device, and nothing is allocated but results and copies of what is not contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import carrier, launches, select
from .arguments import (
    Kept,
    check_branch,
    check_columns,
    check_devices,
    check_matrix,
    check_packed,
    check_shape,
    check_types,
    name_of,
    number_of,
    output,
)
from .driver import Card
from .starts import Start
from .structs import KINDS, Floats, Gemm, GemmGelu, GemmInt8, Gemv, Quantize

# Columns that K must be a multiple of.
GROUPS = {"int4": 64, "int4-unsigned": 64, "e4m3": carrier.GROUP, "nvfp4": 16, "int8": 16}
_Quantized = tuple[Tensor, Tensor, Tensor]
_Some = Tensor | None


@dataclass(frozen=True)
class Following:
    """The layer behind a fused product: the kind of its activations, its tensors, its shift, and x's dtype."""

    kind: str
    smooth: Tensor
    down: Tensor
    shift: float
    dtype: torch.dtype


class CudaOps:
    """One method for each op, over the kernels of the GPU where its tensors are.

    card  index of a GPU -> the GPU
    """

    def __init__(self, card: Callable[[int | None], Card]) -> None:
        self._card = card

    def _launch(self, t: Tensor, spelling: str, starts: Callable[[Card], Iterable[Start]]) -> None:
        card = self._card(t.device.index)
        try:
            for start in starts(card):
                card.launch(start)
        except RuntimeError as problem:
            raise RuntimeError(f"svdquant kernels, spelling '{spelling}': {problem}") from problem

    def spellings(self, device: Tensor) -> str:
        """Names of all that a GPU can run, best first."""
        capability = divmod(self._card(device.device.index).arch, 10)
        card = select.Device("cuda", capability=capability, by_nvrtc=True)
        return " ".join(row.name for row in select.to_try(card) if row.library)

    def quantize_int4(self, x: Tensor, smooth: Tensor, down: Tensor, spelling: str) -> _Quantized:
        return self._quantize("int4", x, smooth, down, 0.0, spelling)

    def quantize_int4_unsigned(
        self, x: Tensor, smooth: Tensor, down: Tensor, shift: float, spelling: str
    ) -> _Quantized:
        return self._quantize("int4-unsigned", x, smooth, down, shift, spelling)

    def quantize_nvfp4(self, x: Tensor, smooth: Tensor, down: Tensor, spelling: str) -> _Quantized:
        return self._quantize("nvfp4", x, smooth, down, 0.0, spelling)

    def quantize_int8(
        self, x: Tensor, smooth: Tensor, down: Tensor, shift: float, spelling: str
    ) -> _Quantized:
        return self._quantize("int8", x, smooth, down, shift, spelling)

    def _quantize(
        self, kind: str, x: Tensor, smooth: Tensor, down: Tensor, shift: float, spelling: str
    ) -> _Quantized:
        check_matrix(x, "x", "[M, K]")
        check_devices(x, smooth=smooth, down=down)
        (m, k), group = x.shape, GROUPS[kind]
        if k == 0 or k % group:
            raise ValueError(f"x: last axis is {k}, expected a multiple of {group}. Pad K first.")
        check_shape(smooth, "smooth", k)
        if down.ndim != 2 or down.shape[1] != k:
            raise ValueError(f"down: expected [R, {k}], got {list(down.shape)}")
        r, carried = down.shape[0], kind in ("int4", "int4-unsigned") and spelling in select.E4M3
        codes, scales = carrier.empty(x, m, k) if carried else _empty(kind, x)
        hidden = x.new_empty(m, r, dtype=torch.float32)
        if m:
            kept = Kept()
            inputs = kept.matrix(x, "x"), kept.vector(smooth, "smooth"), kept.matrix(down, "down")
            outputs = codes.data_ptr(), scales.data_ptr(), hidden.data_ptr()
            args = Quantize(
                KINDS[kind], m, k, r, *inputs, shift, *outputs, scales.stride(1) if carried else 0
            )
            self._launch(
                x, spelling, lambda card: [launches.quantize(kind, card.arch, args, carried=carried)]
            )
        return codes, scales, hidden

    def gemm_int4(self, codes: Tensor, scales: Tensor, hidden: Tensor, *rest: Any) -> None:
        """`rest`: weight_codes, weight_scales, up, bias, addend, out, spelling."""
        weight_codes, weight_scales, *branch = rest
        integers = "int4-unsigned" if codes.dtype == torch.uint8 else "int4"
        kind = "e4m3" if branch[-1] in select.E4M3 else integers
        self._gemm(kind, (codes, scales, hidden), weight_codes, weight_scales, None, *branch)

    def gemm_nvfp4(self, codes: Tensor, scales: Tensor, hidden: Tensor, *rest: Any) -> None:
        """`rest`: weight_codes, weight_scales, second_scale, up, bias, addend, out, spelling."""
        self._gemm("nvfp4", (codes, scales, hidden), *rest)

    def _gemm(
        self,
        kind: str,
        activations: _Quantized,
        weight_codes: Tensor,
        weight_scales: Tensor,
        second_scale: _Some,
        up: Tensor,
        *rest: Any,
    ) -> None:
        """`rest`: bias, addend, out, spelling."""
        (codes, scales, hidden), (bias, addend, out, spelling) = activations, rest
        check_packed(weight_codes)
        there = dict(scales=scales, hidden=hidden, weight_codes=weight_codes, weight_scales=weight_scales)
        check_devices(codes, **there, second_scale=second_scale, up=up, bias=bias, addend=addend, out=out)
        kept = Kept()
        args = _product(kept, kind, activations, weight_codes, weight_scales, up, bias)
        args.out, args.addend = output(out, args.m, args.n), kept.addend(addend, args.m, args.n)
        if args.m == 0 or args.n == 0:
            return
        args.second_scale = kept.factor(second_scale, args.n)
        scratch = partial(kept.scratch, hidden)
        self._launch(codes, spelling, lambda card: launches.gemm(spelling, kind, card, args, scratch))

    def gemm_int4_gelu(self, codes: Tensor, scales: Tensor, hidden: Tensor, *rest: Any) -> _Quantized:
        """`rest`: weight_codes, weight_scales, up, bias, next_smooth, next_down, next_shift, dtype, spelling."""
        *weight, up, bias, smooth, down, shift, dtype, spelling = rest
        then = Following("int4-unsigned" if shift else "int4", smooth, down, shift, dtype)
        check_types(torch.int8, codes=codes)
        return self._gemm_gelu("int4", (codes, scales, hidden), *weight, None, up, bias, then, spelling)

    def gemm_nvfp4_gelu(self, codes: Tensor, scales: Tensor, hidden: Tensor, *rest: Any) -> _Quantized:
        """`rest`: weight_codes, weight_scales, second_scale, up, bias, next_smooth, next_down, dtype, spelling."""
        *weight, up, bias, smooth, down, dtype, spelling = rest
        then = Following("nvfp4", smooth, down, 0.0, dtype)
        return self._gemm_gelu("nvfp4", (codes, scales, hidden), *weight, up, bias, then, spelling)

    def _gemm_gelu(
        self,
        kind: str,
        activations: _Quantized,
        weight_codes: Tensor,
        weight_scales: Tensor,
        second_scale: _Some,
        up: Tensor,
        bias: _Some,
        then: Following,
        spelling: str,
    ) -> _Quantized:
        codes, scales, hidden = activations
        check_packed(weight_codes)
        there = dict(scales=scales, hidden=hidden, weight_codes=weight_codes, weight_scales=weight_scales)
        there |= dict(
            second_scale=second_scale, up=up, bias=bias, next_smooth=then.smooth, next_down=then.down
        )
        check_devices(codes, **there)
        kept = Kept()
        args = _product(kept, kind, activations, weight_codes, weight_scales, up, bias)
        m, n, group, r = args.m, args.n, GROUPS[kind], then.down.shape[0]
        if n % group:
            raise ValueError(f"weight_codes: expected rows in groups of {group}, got {n}")
        check_shape(then.smooth, "next_smooth", n)
        check_shape(then.down, "next_down", r, n)
        made = (
            codes.new_empty(m, n, dtype=torch.int8 if then.kind == "int4" else torch.uint8),
            codes.new_empty(m, n // group, dtype=torch.float8_e4m3fn if kind == "nvfp4" else then.dtype),
            hidden.new_empty(m, r),
        )
        if m and n:
            args.second_scale = kept.factor(second_scale, n)
            x = args.out.dtype = number_of(then.dtype, "dtype")
            factors = kept.vector(then.smooth, "next_smooth"), kept.matrix(then.down, "next_down")
            outputs = (t.data_ptr() for t in made)
            behind = Quantize(KINDS[then.kind], m, n, r, Floats(None, x), *factors, then.shift, *outputs)
            fused = GemmGelu(args, behind)
            scratch = partial(kept.scratch, hidden)
            start = partial(launches.gemm_gelu, spelling, args=fused, kind=then.kind, scratch=scratch)
            self._launch(codes, spelling, lambda card: start(card.arch))
        return made

    def gemm_int8(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weight_codes: Tensor,
        weight_scales: Tensor,
        up: Tensor,
        *rest: Any,
    ) -> None:
        """`rest`: bias, addend, out, spelling."""
        bias, addend, out, spelling = rest
        check_types(torch.int8, codes=codes, weight_codes=weight_codes)
        check_types(torch.float32, scales=scales, hidden=hidden, weight_scales=weight_scales)
        check_matrix(weight_codes, "weight_codes", "[N, K]")
        there = dict(scales=scales, hidden=hidden, weight_codes=weight_codes, weight_scales=weight_scales)
        check_devices(codes, **there, up=up, bias=bias, addend=addend, out=out)
        m, (n, k), r = codes.shape[0], weight_codes.shape, up.shape[-1]
        check_columns(k)
        check_shape(codes, "codes", m, k)
        check_shape(scales, "scales", m, 1)
        check_shape(weight_scales, "weight_scales", n, 1)
        check_branch(hidden, up, bias, m, n)
        kept = Kept()
        to, added = output(out, m, n), kept.addend(addend, m, n)
        if m == 0 or n == 0:
            return
        first = map(kept.whole, (codes, scales, hidden, weight_codes, weight_scales))
        scratch = partial(kept.scratch, hidden)
        args = GemmInt8(m, n, k, r, *first, kept.matrix(up, "up"), kept.vector(bias, "bias"), added, to)
        self._launch(codes, spelling, lambda card: launches.gemm(spelling, "int8", card, args, scratch))

    def gemv_awq(
        self,
        x: Tensor,
        weight_codes: Tensor,
        weight_scales: Tensor,
        zeros: Tensor,
        bias: _Some,
        addend: _Some,
        out: Tensor,
        spelling: str,
    ) -> None:
        check_packed(weight_codes)
        check_matrix(x, "x", "[M, K]")
        there = dict(weight_codes=weight_codes, weight_scales=weight_scales, zeros=zeros)
        check_devices(x, **there, bias=bias, addend=addend, out=out)
        m, n, k, groups = (
            x.shape[0],
            weight_codes.shape[0],
            weight_codes.shape[1] * 2,
            weight_scales.shape[-1],
        )
        group = k // groups if groups else 0
        if not group or group % 64 or groups * group != k:
            expected = f"one for every 64 (or a multiple of 64) of {k} columns"
            raise ValueError(f"weight_scales: expected {expected}, got {groups} a row")
        check_shape(x, "x", m, k)
        check_shape(weight_scales, "weight_scales", n, groups)
        check_shape(zeros, "zeros", n, groups)
        if bias is not None:
            check_shape(bias, "bias", n)
        kept = Kept()
        to, added = output(out, m, n), kept.addend(addend, m, n)
        if m == 0 or n == 0:
            return
        factors = (
            kept.matrix(weight_scales, "weight_scales"),
            kept.matrix(zeros, "zeros"),
            kept.vector(bias, "bias"),
        )
        args = Gemv(m, n, k, group, kept.matrix(x, "x"), kept.whole(weight_codes), *factors, added, to)
        self._launch(x, spelling, lambda _: [launches.gemv(args)])


def _empty(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations of a kind, not yet written."""
    m, k = x.shape
    codes = torch.int8 if kind in ("int4", "int8") else torch.uint8
    scales = {"int8": torch.float32, "nvfp4": torch.float8_e4m3fn}.get(kind, x.dtype)
    columns = 1 if kind == "int8" else k // GROUPS[kind]
    return x.new_empty(m, k, dtype=codes), x.new_empty(m, columns, dtype=scales)


def _product(
    kept: Kept,
    kind: str,
    activations: _Quantized,
    weight_codes: Tensor,
    weight_scales: Tensor,
    up: Tensor,
    bias: _Some,
) -> Gemm:
    """What a 4-bit product multiplies, checked, without where it goes."""
    codes, scales, hidden = activations
    m, n, k, r = codes.shape[0], weight_codes.shape[0], weight_codes.shape[1] * 2, up.shape[-1]
    check_columns(k)
    _check_codes(codes, carried=kind == "e4m3")
    check_types(torch.float32, hidden=hidden)
    groups = k // GROUPS[kind]
    check_shape(codes, "codes", m, k)
    check_shape(scales, "scales", m, groups)
    check_shape(weight_scales, "weight_scales", n, groups)
    check_branch(hidden, up, bias, m, n)
    read = kept.by_group if kind == "e4m3" else kept.matrix
    first = kept.whole(codes), read(scales, "scales"), kept.whole(hidden), kept.whole(weight_codes)
    factors = kept.matrix(weight_scales, "weight_scales"), Floats(), kept.matrix(up, "up")
    return Gemm(KINDS[kind], m, n, k, r, *first, *factors, kept.vector(bias, "bias"))


def _check_codes(codes: Tensor, *, carried: bool) -> None:
    if codes.dtype not in ((carrier.CODES,) if carried else (torch.int8, torch.uint8)):
        expected = name_of(carrier.CODES) if carried else "int8 or uint8"
        raise ValueError(
            f"codes: expected {expected} for this spelling, got {name_of(codes.dtype)}. "
            "Quantize and multiply with the same one."
        )


# ---- behind torch.ops ----

OPS = ("spellings", *select.OPS)
_registered: list[torch.library.Library] = []


@cache
def register(card: Callable[[int | None], Card]) -> None:
    """Stand behind torch.ops.svdquant on GPUs, unless a second copy of this pack in the process does."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("svdquant::gemv_awq", "CUDA"):
        return
    library, ops = torch.library.Library("svdquant", "IMPL"), CudaOps(card)
    for name in OPS:
        library.impl(name, getattr(ops, name), "CUDA")
    _registered.append(library)  # a library that is not kept takes its ops along
