"""The op set on any device: same names and signatures as core.reference, each call sent where its tensors are.

A call on a device whose kernels can be had goes to `torch.ops.svdquant`, an opaque op that torch.compile keeps whole;
any other goes to core.reference or core.weight_only, as select.py says. The first call on a device builds or loads its
library. One model may run on several devices, and this module is the op set for all of them; `OpSet("avx2")` is one
that insists on a spelling.

A product there writes into an output that it is given, which may be columns of a wider one. Its schema says so, and
torch.compile gives it the memory itself: inductor copies nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

from ..core import reference, weight_only
from ..core.weights import LinearWeights
from . import carrier, gpu, jit, scaled, select
from .settings import settings

_QUANTIZED = "(Tensor codes, Tensor scales, Tensor hidden)"
_ACTS = "Tensor x, Tensor smooth, Tensor down"
_CODES = "Tensor codes, Tensor scales, Tensor hidden, Tensor weight_codes, Tensor weight_scales"
_OUTPUT = "Tensor? bias, Tensor? addend, Tensor(a!) out, str spelling) -> ()"
_NEXT = "Tensor? bias, Tensor next_smooth, Tensor next_down"
_FUSED = f"ScalarType dtype, str spelling) -> {_QUANTIZED}"
SCHEMAS = (
    "spellings(Tensor device) -> str",
    f"quantize_int4({_ACTS}, str spelling) -> {_QUANTIZED}",
    f"quantize_int4_unsigned({_ACTS}, float shift, str spelling) -> {_QUANTIZED}",
    f"quantize_nvfp4({_ACTS}, str spelling) -> {_QUANTIZED}",
    f"quantize_int8({_ACTS}, float shift, str spelling) -> {_QUANTIZED}",
    f"gemm_int4({_CODES}, Tensor up, {_OUTPUT}",
    f"gemm_int4_gelu({_CODES}, Tensor up, {_NEXT}, float next_shift, {_FUSED}",
    f"gemm_nvfp4({_CODES}, Tensor second_scale, Tensor up, {_OUTPUT}",
    f"gemm_nvfp4_gelu({_CODES}, Tensor second_scale, Tensor up, {_NEXT}, {_FUSED}",
    f"gemm_int8({_CODES}, Tensor up, {_OUTPUT}",
    f"gemv_awq(Tensor x, Tensor weight_codes, Tensor weight_scales, Tensor zeros, {_OUTPUT}",
)
library = torch.library.Library("svdquant", "FRAGMENT")


# ---- what torch.compile sees: shapes and dtypes of the results ----


def _fake_quantize(x: Tensor, down: Tensor, group: int | None, codes: torch.dtype, scales: torch.dtype):
    m, k = x.shape
    return (
        x.new_empty(m, k, dtype=codes),
        x.new_empty(m, k // group if group else 1, dtype=scales),
        x.new_empty(m, down.shape[0], dtype=torch.float32),
    )


def _fake_quantize_int4(x: Tensor, down: Tensor, codes: torch.dtype, spelling: str):
    if spelling not in select.E4M3:
        return _fake_quantize(x, down, 64, codes, x.dtype)
    return *carrier.empty(x, *x.shape), x.new_empty(x.shape[0], down.shape[0], dtype=torch.float32)


def _fake_product(*_) -> None:
    """Nothing: a product writes into the output that it is given."""


def _fake_gemm_int4_gelu(codes, scales, hidden, weight_codes, *rest):
    *_, down, shift, dtype, _spelling = rest
    x = hidden.new_empty(codes.shape[0], weight_codes.shape[0], dtype=dtype)
    return _fake_quantize(x, down, 64, torch.uint8 if shift else torch.int8, dtype)


def _fake_gemm_nvfp4_gelu(codes, scales, hidden, weight_codes, *rest):
    *_, down, dtype, _spelling = rest
    x = hidden.new_empty(codes.shape[0], weight_codes.shape[0], dtype=dtype)
    return _fake_quantize(x, down, 16, torch.uint8, torch.float8_e4m3fn)


_FAKES = {
    "quantize_int4": lambda x, s, down, spelling: _fake_quantize_int4(x, down, torch.int8, spelling),
    "quantize_int4_unsigned": lambda x, s, down, shift, spelling: _fake_quantize_int4(
        x, down, torch.uint8, spelling
    ),
    "quantize_nvfp4": lambda x, s, down, spelling: _fake_quantize(
        x, down, 16, torch.uint8, torch.float8_e4m3fn
    ),
    "quantize_int8": lambda x, s, down, shift, spelling: _fake_quantize(
        x, down, None, torch.int8, torch.float32
    ),
    **dict.fromkeys(("gemm_int4", "gemm_nvfp4", "gemm_int8", "gemv_awq"), _fake_product),
    "gemm_int4_gelu": _fake_gemm_int4_gelu,
    "gemm_nvfp4_gelu": _fake_gemm_nvfp4_gelu,
}


@cache
def declare() -> None:
    """Tell torch the schemas, unless a second copy of this pack in the process has done so.

    Not at import: torch looks for the caller among all loaded modules, six times, which takes 0.2 s in a host.
    """
    if hasattr(torch.ops.svdquant, "gemv_awq"):
        return
    for schema in SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"svdquant::{name}", fake, lib=library)


# ---- which spelling ----


@cache
def device(kind: str, index: int | None = None) -> select.Device:
    """What a device can do; builds, tries or loads its library on the first call."""
    declare()
    if kind == "cuda":
        return gpu.find(index)
    if kind != "cpu":
        return select.Device(kind)
    missing = jit.load(jit.cpu_target())
    names = "" if missing else torch.ops.svdquant.spellings(torch.empty(0))
    return select.Device("cpu", features=frozenset(names.split()), missing=missing or "")


@cache
def choose(request: select.Request, kind: str, index: int | None = None) -> select.Choice:
    """The spelling of a call on a device, with the reasons against better ones."""
    return select.choose(device(kind, index), request)


def wanted(request: select.Request) -> select.Request:
    """The same request with the word of SVDQUANT_KERNELS."""
    return replace(request, wanted=settings().kernels)


@torch.compiler.assume_constant_result
def _spelling(
    op: str, wanted: str | None, dtype: torch.dtype, where: torch.device, tokens: int | None
) -> str:
    """The name of the spelling to call with."""
    return _known(op, wanted, dtype, where, tokens)


@cache  # by what a call has at hand: to make a request each time would take as long as torch takes to call the op
def _known(op: str, wanted: str | None, dtype: torch.dtype, where: torch.device, tokens: int | None) -> str:
    name = str(dtype).removeprefix("torch.")
    request = select.Request(op, name, tokens=tokens, wanted=wanted or settings().kernels)
    return choose(request, where.type, where.index).spelling


# ---- the ops ----

PLAIN = {select.REFERENCE: reference, select.WEIGHT_ONLY: weight_only, select.TORCH_SCALED: scaled}


def _output(like: Tensor, weights: LinearWeights, dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape[0], weights.out_features, dtype=dtype)


class OpSet:
    """The ops of core.reference, sent to a spelling: the best one, or one by name.

    wanted  as SVDQUANT_KERNELS: "auto", "off", or a spelling's name; None takes the variable's word
    """

    def __init__(self, wanted: str | None = None) -> None:
        self.wanted = wanted

    def _choose(self, op: str, x: Tensor, dtype: torch.dtype) -> str:
        """The spelling to call with; a quantizer and its product, of as many tokens, get the same one."""
        return _spelling(op, self.wanted, dtype, x.device, select.about(op, x.shape[0]))

    def _choose_gemm(
        self, op: str, codes: Tensor, scales: Tensor | None, weights: LinearWeights, output: torch.dtype
    ) -> str:
        """The spelling that can multiply what its quantizer made; no scales means unquantized activations."""
        if scales is None:
            return select.WEIGHT_ONLY
        dtype = output if op == "gemm_nvfp4" or output == torch.float64 else scales.dtype
        usual = weights.spec.group == select.GROUPS[op]
        spelling = self._choose(op, codes, dtype) if usual else select.REFERENCE
        return select.REFERENCE if spelling == select.WEIGHT_ONLY else spelling

    def _quantize(
        self, op: str, x: Tensor, smooth: Tensor, down: Tensor, *shift: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Any quantizer, by the spelling that is for activations of its dtype."""
        spelling = self._choose(op, x, x.dtype)
        if spelling in PLAIN:
            return getattr(PLAIN[spelling], op)(x, smooth, down, *shift)
        return getattr(torch.ops.svdquant, op)(x, smooth, down, *shift, spelling)

    def _product(
        self,
        op: str,
        quantized: tuple[Tensor, Tensor | None, Tensor],
        w: LinearWeights,
        dtype: torch.dtype,
        out: Tensor | None,
        addend: Tensor | None,
        *second_scale: Tensor,
    ) -> Tensor:
        """Any product of quantized activations, by the spelling that fits them; the output is made if none is given."""
        codes, scales, hidden = quantized
        spelling = self._choose_gemm(op, codes, scales, w, dtype)
        if spelling in PLAIN:
            return getattr(PLAIN[spelling], op)(*quantized, w, dtype=dtype, out=out, addend=addend)
        out = _output(codes, w, dtype) if out is None else out
        if spelling in select.E4M3:
            codes, scales = carrier.carried(codes, scales)
        call = getattr(torch.ops.svdquant, op)
        call(codes, scales, hidden, w.codes, w.scales, *second_scale, w.up, w.bias, addend, out, spelling)
        return out

    def quantize_int4(self, x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signed int4 activations, on Hopper as carrier.py says; see core.reference.quantize_int4."""
        return self._quantize("quantize_int4", x, smooth, down)

    def quantize_int4_unsigned(
        self, x: Tensor, smooth: Tensor, down: Tensor, shift: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unsigned int4 activations of x + shift, likewise; see core.reference.quantize_int4_unsigned."""
        return self._quantize("quantize_int4_unsigned", x, smooth, down, shift)

    def quantize_nvfp4(self, x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e2m1 activations; see core.reference.quantize_nvfp4."""
        return self._quantize("quantize_nvfp4", x, smooth, down)

    def quantize_int8(
        self, x: Tensor, smooth: Tensor, down: Tensor, shift: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """int8 activations of x + shift, one scale a token; see core.reference.quantize_int8."""
        return self._quantize("quantize_int8", x, smooth, down, shift)

    def gemm_int4(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """W4A4 GEMM with branch and bias; see core.reference.gemm_int4."""
        quantized = codes, scales, hidden
        return self._product("gemm_int4", quantized, weights, dtype, out, addend)

    def gemm_int4_gelu(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        following: LinearWeights,
        *,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W4A4 GEMM, GELU and the next layer's activations; see core.reference.gemm_int4_gelu."""
        w, then, shift = weights, following, following.spec.act_shift
        spelling = self._choose_fused("gemm_int4_gelu", codes, scales, w, then, dtype)
        if spelling != select.APART and codes.dtype == torch.int8:
            return torch.ops.svdquant.gemm_int4_gelu(
                *(codes, scales, hidden, w.codes, w.scales, w.up, w.bias),
                *(then.smooth, then.down, shift, dtype, spelling),
            )
        x = gelu(self.gemm_int4(codes, scales, hidden, w, dtype=dtype), approximate="tanh")
        if shift:
            return self.quantize_int4_unsigned(x, then.smooth, then.down, shift)
        return self.quantize_int4(x, then.smooth, then.down)

    def _choose_fused(
        self,
        op: str,
        codes: Tensor,
        scales: Tensor | None,
        w: LinearWeights,
        following: LinearWeights,
        dtype: torch.dtype,
    ) -> str:
        """The spelling of what the fused kernels are written for: whole tiles, usual groups, one 16-bit dtype."""
        usual = w.spec.group == following.spec.group == select.GROUPS[op]
        one_dtype = following.rank == 0 or following.down.dtype == dtype
        whole = w.out_features % select.FUSED_ROWS == 0
        fits = scales is not None and usual and one_dtype and whole
        return self._choose(op, codes, dtype) if fits else select.APART

    def gemm_nvfp4(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """NVFP4 GEMM with branch and bias; see core.reference.gemm_nvfp4."""
        quantized = codes, scales, hidden
        return self._product("gemm_nvfp4", quantized, weights, dtype, out, addend, weights.second_scale)

    def gemm_nvfp4_gelu(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        following: LinearWeights,
        *,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """NVFP4 GEMM, GELU and the next layer's activations; see core.reference.gemm_nvfp4_gelu."""
        w, then = weights, following
        spelling = self._choose_fused("gemm_nvfp4_gelu", codes, scales, w, then, dtype)
        if spelling != select.APART:
            return torch.ops.svdquant.gemm_nvfp4_gelu(
                *(codes, scales, hidden, w.codes, w.scales, w.second_scale, w.up, w.bias),
                *(then.smooth, then.down, dtype, spelling),
            )
        x = gelu(self.gemm_nvfp4(codes, scales, hidden, w, dtype=dtype), approximate="tanh")
        return self.quantize_nvfp4(x, then.smooth, then.down)

    def gemm_int8(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """W8A8 GEMM with branch and bias; see core.reference.gemm_int8."""
        quantized = codes, scales, hidden
        return self._product("gemm_int8", quantized, weights, dtype, out, addend)

    def gemv_awq(
        self,
        x: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """W4A16 product with the bias; see core.reference.gemv_awq."""
        w, spelling = weights, self._choose("gemv_awq", x, x.dtype)
        if w.spec.group % select.GROUPS["gemv_awq"] and spelling not in PLAIN:
            spelling = select.REFERENCE
        if spelling in PLAIN:
            return PLAIN[spelling].gemv_awq(x, w, dtype=dtype, out=out, addend=addend)
        out = _output(x, w, dtype) if out is None else out
        torch.ops.svdquant.gemv_awq(x, w.codes, w.scales, w.zeros, w.bias, addend, out, spelling)
        return out


_default = OpSet()
quantize_int4 = _default.quantize_int4
quantize_int4_unsigned = _default.quantize_int4_unsigned
quantize_nvfp4 = _default.quantize_nvfp4
quantize_int8 = _default.quantize_int8
gemm_int4 = _default.gemm_int4
gemm_int4_gelu = _default.gemm_int4_gelu
gemm_nvfp4 = _default.gemm_nvfp4
gemm_nvfp4_gelu = _default.gemm_nvfp4_gelu
gemm_int8 = _default.gemm_int8
gemv_awq = _default.gemv_awq


def describe(kind: str, index: int | None = None, *, wide: bool = False) -> str:
    """What computes a W4A4 (or W8A8) layer on a device, in words for a log: "avx2 (not avx512: ...)"."""
    request = select.Request("gemm_int8" if wide else "gemm_int4", "bfloat16")
    return choose(wanted(request), kind, index).sentence()


def fuses(op: str, kind: str, index: int | None = None) -> bool:
    """Whether a device computes a fused op in one kernel, for activations of some dtype."""
    requests = (wanted(select.Request(op, dtype)) for dtype in ("bfloat16", "float16"))
    return any(choose(request, kind, index).spelling != select.APART for request in requests)


def eight_bits_pay(kind: str, index: int | None = None) -> bool:
    """Whether a 4-bit checkpoint runs faster in 8 bits on a device."""
    return kind == "cuda" and select.eight_bits_pay(device(kind, index), settings().kernels)
