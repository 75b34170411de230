"""Who runs in benchmarks/gpu.py: every way from a bf16 x to a bf16 y of one SVDQuant layer with a branch and a bias.

All hold the same layers: the baseline as a dense bf16 weight, the 8-bit ones as the smoothed 4-bit residual rounded to
8 bits with the branch beside it. Several layers and inputs take turns, so that no weight is still in a cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from ..svdquant.core import int4, int8, linear, reference
from ..svdquant.core.linear import Part
from ..svdquant.core.weights import AWQ, INT4, INT4_UNSIGNED, NVFP4, LinearWeights
from ..svdquant.kernels import ops, select

BF16 = torch.bfloat16
UNCHECKED = ", to the next layer's codes"  # whose results are no outputs
Contender = Callable[[int], Tensor]  # of a running number, which picks the input and the layer


@dataclass(frozen=True)
class Work:
    """What a contender computes with: equally many inputs, layers and their dense weights."""

    xs: list[Tensor]  # [M, K]
    layers: list[LinearWeights]  # int4, or awq for a modulation
    dense: list[Tensor]  # [N, K]

    def x(self, i: int) -> Tensor:
        return self.xs[i % len(self.xs)]


def make_work(m: int, n: int, k: int, rank: int, sets: int, device: str, awq: bool = False) -> Work:
    layers = [random_layer(n, k, rank, device, awq) for _ in range(sets)]
    xs = [torch.randn(m, k, device=device).to(BF16) for _ in range(sets)]
    return Work(xs, layers, [reference.dequantize(w).to(BF16) for w in layers])


def random_layer(n: int, k: int, rank: int, device: str, awq: bool = False) -> LinearWeights:
    """Random codes and scales: zeros would run faster, as less of the chip would switch."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(BF16)

    codes = torch.randint(0, 256, (n, k // 2), device=device, dtype=torch.uint8)
    scales = ((torch.rand(n, k // 64, device=device) + 0.5) * 0.2 * k**-0.5).to(BF16)
    if awq:
        return LinearWeights(AWQ, codes, scales, zeros=-7 * scales, bias=random(n))
    smooth = (torch.rand(k, device=device) + 0.5).to(BF16)
    branch = dict(down=random(rank, k, scale=k**-0.5), up=random(n, rank, scale=0.3), bias=random(n))
    return LinearWeights(INT4, codes, scales, smooth=smooth, **branch)


def contenders(work: Work, device: str) -> Iterator[tuple[str, Work, Callable[[Work], Contender]]]:
    """Name, layers, and what makes a contender of them, the baseline first; making may fail, where an op is missing."""
    yield "cublas_bf16", work, dense_bf16
    if work.layers[0].spec == AWQ:
        yield from by_spelling("gemv_awq", work, device)
        yield "kitchen_awq", work, kitchen_awq
        return
    yield from by_spelling("gemm_int4", work, device)
    for row in rows_here(device, "gemm_int4"):
        yield (
            f"svdquant_{row.name}, product alone",
            work,
            lambda w, row=row: our_product(w, ops.OpSet(row.name)),
        )
    if work.dense[0].shape[0] > 3 * work.dense[0].shape[1]:  # the first layer of a feed-forward
        yield from before_a_gelu("gemm_int4_gelu", work, device)
        yield from before_a_gelu("gemm_nvfp4_gelu", nvfp4_of(work), device, " of nvfp4")
    yield from by_spelling("gemm_nvfp4", nvfp4_of(work), device, " of nvfp4")
    if any(row.name == select.TORCH_SCALED for row in rows_here(device, "gemm_nvfp4")):
        yield "svdquant_torch_scaled of nvfp4, our quantizer", nvfp4_of(work), torch_scaled
    yield from by_spelling("gemm_int8", int8_of(work), device, " of int8")
    yield "svdquant_weight_only", work, lambda w: ours(w, ops.OpSet(select.WEIGHT_ONLY))
    yield "torch_fp8_rows", work, torch_fp8
    yield "torch_int_mm", work, torch_int_mm
    yield "kitchen_svdquant", work, kitchen_svdquant
    yield "kitchen_int8", work, kitchen_int8


def by_spelling(op: str, work: Work, device: str, of: str = "") -> Iterator[tuple[str, Work, Callable]]:
    for row in rows_here(device, op):
        yield f"svdquant_{row.name}{of}", work, lambda w, row=row: ours(w, ops.OpSet(row.name))


def before_a_gelu(op: str, work: Work, device: str, of: str = "") -> Iterator[tuple[str, Work, Callable]]:
    """Each fused kernel, and its ops apart."""
    for row in rows_here(device, op):
        for name, fused in (
            (f"{row.name}{of}{UNCHECKED}", True),
            (f"{row.beside}{of}{UNCHECKED}, apart", False),
        ):
            yield f"svdquant_{name}", work, lambda w, row=row, fused=fused: with_gelu(w, row, fused)


def rows_here(device: str, op: str) -> list[select.Spelling]:
    """The table's rows for an op that this device can run, and survive."""
    here = ops.device(device)
    return [row for row in select.to_try(here) if op in row.ops and row.name not in here.distrusted]


# ---- dense ----


def dense_bf16(work: Work) -> Contender:
    """What a 16-bit model runs: the honest baseline."""
    return lambda i: torch.nn.functional.linear(
        work.x(i), work.dense[i % len(work.dense)], work.layers[i % len(work.layers)].bias
    )


# ---- ours ----


def ours(work: Work, op_set: ops.OpSet | SimpleNamespace) -> Contender:
    """As a host's layer calls it."""
    parts = [(Part(replace(w, bias=None)), w.bias) for w in work.layers]

    def call(i: int) -> Tensor:
        part, bias = parts[i % len(parts)]
        return linear.forward(work.x(i), (part,), bias, (), op_set)

    return call


def our_product(work: Work, op_set: ops.OpSet) -> Contender:
    """Without the quantizer, whose results are ready."""
    ready = [op_set.quantize_int4(x, w.smooth, w.down) for x, w in zip(work.xs, work.layers, strict=True)]
    return lambda i: op_set.gemm_int4(*ready[i % len(ready)], work.layers[i % len(ready)], dtype=BF16)


def torch_scaled(work: Work) -> Contender:
    """Torch's product of block-scaled floats on what the kernels of this device quantize."""
    product = ops.OpSet(select.TORCH_SCALED).gemm_nvfp4
    return ours(work, SimpleNamespace(quantize_nvfp4=ops.quantize_nvfp4, gemm_nvfp4=product))


def with_gelu(work: Work, row: select.Spelling, fused: bool) -> Contender:
    """Quantizer, product, GELU and the next layer's quantizer: in two kernels, or in four."""
    n, rank, spec = work.dense[0].shape[0], work.layers[0].rank, work.layers[0].spec
    following = [random_layer(64, n, rank, str(w.codes.device)) for w in work.layers]
    following = [as_nvfp4(w) if spec == NVFP4 else replace(w, spec=INT4_UNSIGNED) for w in following]
    op_set, whole = ops.OpSet(row.beside), getattr(ops.OpSet(row.name), row.ops[0])

    def call(i: int) -> Tensor:
        w, then = (layers[i % len(layers)] for layers in (work.layers, following))
        made = linear.quantize(work.x(i), w, op_set)
        if fused:
            return whole(*made, w, then, dtype=BF16)[0]
        x = torch.nn.functional.gelu(linear.multiply(made, w, op_set, dtype=BF16), approximate="tanh")
        return linear.quantize(x, then, op_set)[0]

    return call


def nvfp4_of(work: Work) -> Work:
    """The same sizes in NVFP4; other numbers."""
    return replace(work, layers=[as_nvfp4(w) for w in work.layers])


def as_nvfp4(w: LinearWeights) -> LinearWeights:
    scales = torch.rand(w.out_features, w.in_features // 16, device=w.codes.device) + 0.5
    second = torch.full((1,), 0.2 * w.in_features**-0.5, device=w.codes.device, dtype=BF16)
    return replace(w, spec=NVFP4, scales=scales.to(torch.float8_e4m3fn), second_scale=second)


def int8_of(work: Work) -> Work:
    return replace(work, layers=[int8.requantize(w) for w in work.layers])


# ---- torch's own 8-bit products, with the branch beside them ----


def with_branch(product: Callable[[Tensor, Tensor, Tensor], Tensor], work: Work, weights: list) -> Contender:
    """product(x / smooth, codes, scales) and what is added to it."""
    factors = [(w.down.T.contiguous(), w.up.T.contiguous()) for w in work.layers]

    def call(i: int) -> Tensor:
        x, w, (down, up) = work.x(i), work.layers[i % len(work.layers)], factors[i % len(factors)]
        y = product(x / w.smooth, *weights[i % len(weights)])
        return torch.addmm(y, x @ down, up).add_(w.bias)

    return call


def smoothed_residual(w: LinearWeights) -> Tensor:
    return int4.dequantize_weight(w.codes, w.scales)


def torch_fp8(work: Work) -> Contender:
    def codes_of(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().amax(-1, keepdim=True).float() / 448
        return (t / scale).to(torch.float8_e4m3fn), scale

    def product(xs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        acts, act_scales = codes_of(xs)
        return torch._scaled_mm(acts, codes.T, scale_a=act_scales, scale_b=scales.T, out_dtype=BF16)

    return with_branch(product, work, [codes_of(smoothed_residual(w)) for w in work.layers])


def torch_int_mm(work: Work) -> Contender:
    def product(xs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        act_scales = xs.abs().amax(-1, keepdim=True).float() / 127
        acts = torch.round(xs / act_scales).to(torch.int8)
        return (torch._int_mm(acts, codes.T) * act_scales * scales.T).to(BF16)

    return with_branch(product, work, [int8.quantize_weight(smoothed_residual(w)) for w in work.layers])


# ---- ComfyUI's kernels ----


def kitchen():
    if importlib.util.find_spec("comfy_kitchen") is None:
        raise RuntimeError("comfy_kitchen is not installed")
    import comfy_kitchen

    return comfy_kitchen


def kitchen_svdquant(work: Work) -> Contender:
    module = kitchen()
    layouts = [
        (w.codes.view(torch.int8), w.scales.T.contiguous(), w.down.T.contiguous()) for w in work.layers
    ]

    def call(i: int) -> Tensor:
        x, w, (codes, scales, down) = work.x(i), work.layers[i % len(layouts)], layouts[i % len(layouts)]
        acts, act_scales, hidden = module.quantize_svdquant_w4a4(x, w.smooth, down)
        y = module.scaled_mm_svdquant_w4a4(acts, codes, act_scales, scales, hidden, w.up, w.bias)
        return y[: x.shape[0]]

    return call


def kitchen_int8(work: Work) -> Contender:
    """The dense weight in rows of int8, without a branch."""
    module = kitchen()
    rows = [int8.quantize_weight(w.float()) for w in work.dense]
    return lambda i: module.int8_linear(
        work.x(i), *rows[i % len(rows)], work.layers[i % len(rows)].bias, out_dtype=BF16
    )


def kitchen_awq(work: Work) -> Contender:
    """Its own packing, whatever the codes in it: only its time is of use."""
    module = kitchen()
    packed = [w.codes.view(torch.int8) for w in work.layers]
    scales = [(w.scales.T.contiguous(), w.zeros.T.contiguous()) for w in work.layers]
    return lambda i: module.gemv_awq_w4a16(
        work.x(i), packed[i % len(packed)], *scales[i % len(packed)], work.layers[i % len(packed)].bias
    )
