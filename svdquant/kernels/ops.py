"""The op set on any device: same names and signatures as core.reference, each call sent where its tensors are.

A call on a device whose kernels can be had goes to `torch.ops.svdquant`, an opaque op that torch.compile keeps whole;
any other goes to core.reference. The first call on a device builds or loads its library. One model may run on several
devices, and this module is the op set for all of them; `OpSet("avx2")` is one that insists on a spelling.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..core import reference
from ..core.weights import LinearWeights
from . import jit, select

_QUANTIZED = "(Tensor codes, Tensor scales, Tensor hidden)"
_ACTS = "Tensor x, Tensor smooth, Tensor down"
_CODES = "Tensor codes, Tensor scales, Tensor hidden, Tensor weight_codes, Tensor weight_scales"
SCHEMAS = (
    "spellings(Tensor device) -> str",
    f"quantize_int4({_ACTS}, str spelling) -> {_QUANTIZED}",
    f"quantize_int4_unsigned({_ACTS}, float shift, str spelling) -> {_QUANTIZED}",
    f"quantize_nvfp4({_ACTS}, str spelling) -> {_QUANTIZED}",
    f"gemm_int4({_CODES}, Tensor up, Tensor? bias, str spelling) -> Tensor",
    f"gemm_nvfp4({_CODES}, Tensor second_scale, Tensor up, Tensor? bias, str spelling) -> Tensor",
    "gemv_awq(Tensor x, Tensor weight_codes, Tensor weight_scales, Tensor zeros, Tensor? bias, str spelling) -> Tensor",
)
library = torch.library.Library("svdquant", "FRAGMENT")


# ---- what torch.compile sees: shapes and dtypes of the results ----


def _fake_quantize(x: Tensor, down: Tensor, group: int, codes: torch.dtype, scales: torch.dtype):
    m, k = x.shape
    return (
        x.new_empty(m, k, dtype=codes),
        x.new_empty(m, k // group, dtype=scales),
        x.new_empty(m, down.shape[0], dtype=torch.float32),
    )


def _fake_gemm(codes, scales, hidden, weight_codes, *rest):
    return hidden.new_empty(codes.shape[0], weight_codes.shape[0])


_FAKES = {
    "quantize_int4": lambda x, s, down, spelling: _fake_quantize(x, down, 64, torch.int8, x.dtype),
    "quantize_int4_unsigned": lambda x, s, down, shift, spelling: _fake_quantize(
        x, down, 64, torch.uint8, x.dtype
    ),
    "quantize_nvfp4": lambda x, s, down, spelling: _fake_quantize(
        x, down, 16, torch.uint8, torch.float8_e4m3fn
    ),
    "gemm_int4": _fake_gemm,
    "gemm_nvfp4": _fake_gemm,
    "gemv_awq": lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0], dtype=torch.float32),
}


def _declare() -> None:
    """Tell torch the schemas, unless a second copy of this pack in the process has done so."""
    if hasattr(torch.ops.svdquant, "gemv_awq"):
        return
    for schema in SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"svdquant::{name}", fake, lib=library)


_declare()


# ---- which spelling ----


@cache
def device(kind: str, index: int | None = None) -> select.Device:
    """What a device can do; builds or loads its library on the first call."""
    if kind == "cpu":
        missing = jit.load(jit.cpu_target())
        names = "" if missing else torch.ops.svdquant.spellings(torch.empty(0))
        return select.Device("cpu", features=frozenset(names.split()), missing=missing or "")
    capability = torch.cuda.get_device_capability(index) if kind == "cuda" else (0, 0)
    return select.Device(kind, capability=capability)


@cache
def choose(request: select.Request, kind: str, index: int | None = None) -> select.Choice:
    """The spelling of a call on a device, with the reasons against better ones."""
    return select.choose(device(kind, index), request)


@torch.compiler.assume_constant_result
def _spelling(op: str, wanted: str | None, dtype: torch.dtype, kind: str, index: int | None) -> str:
    """The name of the spelling to call with, "" for the reference."""
    name = str(dtype).removeprefix("torch.")
    request = select.Request(op, name, wanted=wanted or jit.settings().kernels)
    found = choose(request, kind, index).spelling
    return "" if found == select.REFERENCE else found


# ---- the ops ----


class OpSet:
    """The ops of core.reference, sent to a spelling: the best one, or one by name.

    wanted  as SVDQUANT_KERNELS: "auto", "off", or a spelling's name; None takes the variable's word
    """

    def __init__(self, wanted: str | None = None) -> None:
        self.wanted = wanted

    def _native(self, op: str, x: Tensor, dtype: torch.dtype) -> str:
        """The spelling to call with, "" for the reference."""
        return _spelling(op, self.wanted, dtype, x.device.type, x.device.index)

    def quantize_int4(self, x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signed int4 activations; see core.reference.quantize_int4."""
        if spelling := self._native("quantize_int4", x, x.dtype):
            return torch.ops.svdquant.quantize_int4(x, smooth, down, spelling)
        return reference.quantize_int4(x, smooth, down)

    def quantize_int4_unsigned(
        self, x: Tensor, smooth: Tensor, down: Tensor, shift: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unsigned int4 activations of x + shift; see core.reference.quantize_int4_unsigned."""
        if spelling := self._native("quantize_int4_unsigned", x, x.dtype):
            return torch.ops.svdquant.quantize_int4_unsigned(x, smooth, down, shift, spelling)
        return reference.quantize_int4_unsigned(x, smooth, down, shift)

    def quantize_nvfp4(self, x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e2m1 activations; see core.reference.quantize_nvfp4."""
        if spelling := self._native("quantize_nvfp4", x, x.dtype):
            return torch.ops.svdquant.quantize_nvfp4(x, smooth, down, spelling)
        return reference.quantize_nvfp4(x, smooth, down)

    def gemm_int4(self, codes: Tensor, scales: Tensor, hidden: Tensor, weights: LinearWeights) -> Tensor:
        """W4A4 GEMM with branch and bias; see core.reference.gemm_int4."""
        w = weights
        usual = w.spec.group == select.GROUPS["gemm_int4"]
        if usual and (spelling := self._native("gemm_int4", codes, scales.dtype)):
            return torch.ops.svdquant.gemm_int4(
                codes, scales, hidden, w.codes, w.scales, w.up, w.bias, spelling
            )
        return reference.gemm_int4(codes, scales, hidden, w)

    def gemm_nvfp4(self, codes: Tensor, scales: Tensor, hidden: Tensor, weights: LinearWeights) -> Tensor:
        """NVFP4 GEMM with branch and bias; see core.reference.gemm_nvfp4."""
        w = weights
        usual = w.spec.group == select.GROUPS["gemm_nvfp4"]
        if usual and (spelling := self._native("gemm_nvfp4", codes, hidden.dtype)):
            return torch.ops.svdquant.gemm_nvfp4(
                codes, scales, hidden, w.codes, w.scales, w.second_scale, w.up, w.bias, spelling
            )
        return reference.gemm_nvfp4(codes, scales, hidden, w)

    def gemv_awq(self, x: Tensor, weights: LinearWeights) -> Tensor:
        """W4A16 product with the bias; see core.reference.gemv_awq."""
        w = weights
        usual = w.spec.group % select.GROUPS["gemv_awq"] == 0
        if usual and (spelling := self._native("gemv_awq", x, x.dtype)):
            return torch.ops.svdquant.gemv_awq(x, w.codes, w.scales, w.zeros, w.bias, spelling)
        return reference.gemv_awq(x, w)


_default = OpSet()
quantize_int4 = _default.quantize_int4
quantize_int4_unsigned = _default.quantize_int4_unsigned
quantize_nvfp4 = _default.quantize_nvfp4
gemm_int4 = _default.gemm_int4
gemm_nvfp4 = _default.gemm_nvfp4
gemv_awq = _default.gemv_awq


def describe(kind: str, index: int | None = None) -> str:
    """What computes a W4A4 layer on a device, in words for a log: "avx2 (not avx512: ...)"."""
    request = select.Request("gemm_int4", "bfloat16", wanted=jit.settings().kernels)
    return choose(request, kind, index).sentence()
