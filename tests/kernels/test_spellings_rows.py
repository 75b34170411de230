"""Every spelling as a part of a layer: columns of a wider output, and an fp32 addend before the rounding."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.test_spellings import QUANTIZED, activations, gemm, quantize, same_bits

BF16 = torch.bfloat16
SHAPES = {"one-token": (1, 64), "tails": (9, 63), "two-strips-of-whole-panels": (300, 48)}  # M, N


def judge_columns(ops, inputs, w, dtype):
    """The bits of a plain output at every alignment, with and without an addend, and nothing beside them."""
    m, n, device = inputs[0].shape[0], w.out_features, inputs[0].device
    product = gemm if w.spec.format != "awq" else lambda ops, *args, **to: ops.gemv_awq(*args, **to)
    exact = product(ops, *inputs, w)
    apart = layers.random(m, n + 5, seed=4).to(device)
    for first in (0, 1, 2, 16):
        addend = apart[:, first % 3 : first % 3 + n] if first else None
        canvas = torch.full((m + 2, n + 21), 7.0, dtype=dtype, device=device)
        out = canvas[1:-1, first : first + n]
        got = product(ops, *inputs, w, dtype=dtype, out=out, addend=addend)
        assert got.data_ptr() == out.data_ptr()
        same_bits(out, reference.rounded(exact if addend is None else exact + addend, dtype).cpu())
        out.fill_(7)
        assert (canvas == 7).all()


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [*QUANTIZED, "awq"])
def test_output_among_others(spelled, name, m, n, dtype):
    w = layers.random_linear(name, n, 192, 16)
    x = activations(name, min(m, 20) if name == "awq" else m, 192, BF16)
    inputs = (x,) if name == "awq" else quantize(reference, x, w)
    judge_columns(spelled.ops, [spelled.here(t) for t in inputs], spelled.weights(w), layers.DTYPES[dtype])


def test_fp16_output_saturates_after_the_addend(spelled):
    w = layers.random_linear("int4", 40, 64, 4, dtype=torch.float32)
    quantized = [spelled.here(t) for t in quantize(reference, activations("int4", 5, 64, BF16), w)]
    to = dict(dtype=torch.float16, addend=spelled.here(torch.full((5, 40), 1e6)))
    assert (gemm(spelled.ops, *quantized, spelled.weights(w), **to) == 65504).all()
