"""Random quantized linears, and what the oracle says about them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from svdquant_nodes.svdquant.core import awq, fp4, int4, int8
from svdquant_nodes.svdquant.core.weights import LinearWeights, QuantSpec

from . import oracle

FORMATS = {"int4": (64, 0.0), "int4-unsigned": (64, 0.171875), "nvfp4": (16, 0.0), "awq": (64, 0.0)}
EIGHT_BITS = {  # of which stored layer: the forms that no file holds
    "int8-of-int4": "int4",
    "int8-of-int4-unsigned": "int4-unsigned",
    "int8-of-nvfp4": "nvfp4",
}
COMPUTED = (*FORMATS, *EIGHT_BITS)  # every form that the ops take
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def spec_of(name: str) -> QuantSpec:
    group, shift = FORMATS[name]
    return QuantSpec(name.removesuffix("-unsigned"), group, shift)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def random_linear(
    name: str, n: int, k: int, rank: int = 16, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> LinearWeights:
    """A Gaussian layer of a format in `FORMATS` or `EIGHT_BITS`, with smooth 0.5..2, a branch and a bias."""
    if name in EIGHT_BITS:
        return int8.requantize(random_linear(EIGHT_BITS[name], n, k, rank, dtype=dtype, seed=seed))
    spec, w = spec_of(name), random(n, k, seed=seed, scale=k**-0.5)
    bias = random(n, seed=seed + 1, dtype=dtype)
    if spec.format == "awq":
        codes, scales, zeros = awq.quantize_weight(w, dtype)
        return LinearWeights(spec, codes, scales, zeros=zeros, bias=bias)
    branch = dict(
        smooth=torch.exp2(random(k, seed=seed + 2).clamp(-1, 1)).to(dtype),
        down=random(rank, k, seed=seed + 3, dtype=dtype, scale=k**-0.5),
        up=random(n, rank, seed=seed + 4, dtype=dtype, scale=0.3),
        bias=bias,
    )
    if spec.format == "nvfp4":
        codes, scales, second = fp4.quantize_weight(w, dtype)
        return LinearWeights(spec, codes, scales, second, **branch)
    codes, scales = int4.quantize_weight(w, dtype)
    return LinearWeights(spec, codes, scales, **branch)


def main_weight(w: LinearWeights) -> np.ndarray:
    """The quantized weight on smoothed activations, in float64."""
    numbers = {name: oracle.values(t) for name, t in w.tensors().items() if name != "codes"}
    if w.spec.format == "int4":
        return oracle.weight_int4(oracle.nibbles(w.codes, signed=True), numbers["scales"])
    if w.spec.format == "int8":
        return oracle.values(w.codes) * numbers["scales"]
    codes = oracle.nibbles(w.codes)
    if w.spec.format == "nvfp4":
        return oracle.weight_nvfp4(codes, numbers["scales"], numbers["second_scale"])
    return oracle.weight_awq(codes, numbers["scales"], numbers["zeros"])


def dense(w: LinearWeights) -> np.ndarray:
    """The weight a quantized linear stands for, in float64."""
    if w.spec.format == "awq":
        return main_weight(w)
    return main_weight(w) / oracle.values(w.smooth) + oracle.values(w.up) @ oracle.values(w.down)


def quantize(x: Tensor, w: LinearWeights) -> tuple[np.ndarray, np.ndarray]:
    """Activation codes and stored scales by the oracle."""
    dtype = next(name for name, t in DTYPES.items() if t == x.dtype)
    numbers = oracle.values(x), oracle.values(w.smooth)
    if w.spec.format == "nvfp4":
        return oracle.quantize_nvfp4(*numbers, dtype)
    if w.spec.format == "int8":
        return oracle.quantize_int8(*numbers, w.spec.act_shift, dtype)
    if w.spec.act_shift:
        return oracle.quantize_int4_unsigned(*numbers, w.spec.act_shift, dtype)
    return oracle.quantize_int4(*numbers, dtype)


def forward(x: Tensor, w: LinearWeights) -> np.ndarray:
    """The whole layer by the oracle: exact arithmetic on rounded activations."""
    bias = 0.0 if w.bias is None else oracle.values(w.bias)
    if w.spec.format == "awq":
        return oracle.values(x) @ main_weight(w).T + bias
    acts = oracle.act_values(*quantize(x, w), e2m1=w.spec.format == "nvfp4")
    return oracle.layer(
        oracle.values(x), acts @ main_weight(w).T, oracle.values(w.down), oracle.values(w.up), bias
    )
