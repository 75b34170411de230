"""The last part of a layer, computed with the last part of the next one and the GELU between.

FLUX's single blocks: linear1 is [qkv; mlp] by rows, linear2 is [proj | mlp] by columns. Attention stands between the
first parts, a GELU alone between the last ones. So the first layer is begun, with its last part no further than its
quantized input, and the second one finishes both. Between the two calls nothing but that input is kept.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .linear import Layer, Part, absorb, join, multiply, quantize_part, summed, through_gelu
from .sharing import Quantized, Slot


def begin(x: Tensor, first: Layer, ops: ModuleType, slot: Slot | None) -> tuple[Tensor, Quantized] | None:
    """A layer without the rows of its last part, and that part's quantized input; None where a branch is no rank.

    x        [..., K]   fp32 | bf16 | fp16
    slot     as in `forward`
    returns
      y      [..., N - n]   as x, where n are the last part's rows
    """
    flat = x.reshape(-1, x.shape[-1])
    recall = None if slot is None else partial(slot.recall, x)
    parts, beside = absorb(flat, *first)
    if beside:
        return None
    *others, last = parts
    y = join(flat, others, ops, dtype=x.dtype, recall=recall)
    return y.reshape(*x.shape[:-1], y.shape[-1]), quantize_part(flat, last, ops, recall)


def rest(quantized: Quantized, first: Layer, ops: ModuleType, dtype: torch.dtype) -> Tensor:
    """The rows that `begin` left out: [M, n] `dtype`."""
    return multiply(quantized, _last(first, dtype).weights, ops, dtype=dtype)


def finish(x: Tensor, quantized: Quantized, first: Layer, second: Layer, ops: ModuleType) -> Tensor | None:
    """The next layer, of x and of GELU of what `begin` left out; None where a branch cannot join its part.

    x        [..., K - n]   bf16 | fp16 | fp32
    returns  [..., N]       as x; the bits that `rest`, GELU, a concatenation and `forward` give
    """
    flat = x.reshape(-1, x.shape[-1])
    parts, beside = absorb(flat.new_empty(0, second[0][-1].columns.stop), *second)
    if beside:
        return None
    *others, last = parts
    y = summed(flat, others, ops, dtype=torch.float32)
    between = through_gelu(quantized, _last(first, x.dtype).weights, last.weights, ops, dtype=x.dtype)
    y = multiply(between, last.weights, ops, dtype=x.dtype, addend=y)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _last(layer: Layer, dtype: torch.dtype) -> Part:
    """The last part of a layer, with its branches."""
    part = layer[0][-1]
    absorbed, _ = absorb(torch.empty(0, part.columns.stop, dtype=dtype), [part], layer[1])
    return absorbed[0]
