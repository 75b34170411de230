"""A 16-bit model of the host's own class, published in 4 bits as its family's files are: for families without a demo.

Names come from the host's own maps or are its own; layouts (fused q/k/v, interleaved modulation with its +1) are made
here by hand, apart from the tables that undo them. No branch and no smoothing: the test is about places, not quality.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdquant_nodes.loaders import kitchen, natural
from svdquant_nodes.loaders.nunchaku_linear import V2, encode_linear
from svdquant_nodes.svdquant.core import awq, int4
from svdquant_nodes.svdquant.core.weights import AWQ, INT4, LinearWeights, QuantSpec


def four_bit(weight: Tensor, bias: Tensor | None) -> LinearWeights:
    """Round to int4 as it is: smooth of ones, rank 16 of zeros."""
    (n, k), dtype = weight.shape, torch.bfloat16
    codes, scales = int4.quantize_weight(weight.float(), dtype)
    down, up = torch.zeros(16, k, dtype=dtype), torch.zeros(n, 16, dtype=dtype)
    return LinearWeights(INT4, codes, scales, smooth=torch.ones(k, dtype=dtype), down=down, up=up, bias=bias)


def four_bit_unsigned(weight: Tensor, bias: Tensor, spec: QuantSpec = INT4) -> LinearWeights:
    """The same with the bias of a layer whose activations get 0.171875 added; only some dialects state it."""
    layer = four_bit(weight, None)
    rounded = int4.dequantize_weight(layer.codes, layer.scales)
    shifted = (bias.float() - rounded.sum(1) * 0.171875).to(torch.bfloat16)
    return LinearWeights(spec, **{**layer.tensors(), "bias": shifted})


def four_bit_modulation(weight: Tensor, bias: Tensor, chunks: int) -> LinearWeights:
    """AWQ with chunk-interleaved rows, and 1 added to the bias of chunks 1 and 4."""
    d = weight.shape[0] // chunks
    rows = [s * d + j for j in range(d) for s in range(chunks)]
    folded = bias.float().reshape(chunks, d).clone()
    for s in (1, 4):
        folded[s] += 1
    codes, scales, zeros = awq.quantize_weight(weight[rows].float(), torch.bfloat16)
    return LinearWeights(AWQ, codes, scales, zeros=zeros, bias=folded.reshape(-1)[rows].to(torch.bfloat16))


def four_bit_plain(weight: Tensor, bias: Tensor | None) -> LinearWeights:
    """AWQ in the model's own order."""
    codes, scales, zeros = awq.quantize_weight(weight.float(), torch.bfloat16)
    return LinearWeights(AWQ, codes, scales, zeros=zeros, bias=bias)


def write(path, layers: dict[str, LinearWeights], plain: dict[str, Tensor], dialect: str = "natural") -> None:
    """A file in a dialect, whose layer names are the family's published ones."""
    if dialect != "lite":
        (kitchen if dialect == "kitchen" else natural).write(path, layers, plain, {})
        return
    encoded = {f"{name}.{tail}": t for name, w in layers.items() for tail, t in encode_linear(w, V2).items()}
    save_file({name: t for name, t in {**plain, **encoded}.items() if not name.endswith("_orig")}, path)
