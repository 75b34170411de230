"""Products as large as a model's on a GPU: every tile, several of them for a block, stages that go round many times.

The judge multiplies the same codes in float64 on the card. A product is made several times, and has to be the same to
the bit: what comes too late somewhere seldom comes too late everywhere.
"""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import fp4, int4
from svdquant_nodes.svdquant.core.weights import INT4, INT8, NVFP4, LinearWeights
from svdquant_nodes.svdquant.kernels import hopper
from svdquant_nodes.tests.kernels.test_spellings import gemm
from svdquant_nodes.tests.tolerances import assert_close

K, R = 1088, 40  # an odd number of groups; more ranks than are brought at once
SHAPES = {  # M, N
    "few-tiles": (200, 200),
    "tall": (4100, 200),
    "wide": (300, 9216),
    "wide-and-walks": (520, 9216),
    "walks-of-128": (1000, 4104),
    "walks-of-192": (2050, 2056),
}
TIMES = 4


def test_the_shapes_take_every_tile_of_hopper():
    """On a card with 132 processors, as H100 and H200 have."""
    w8a8 = (hopper.W8A8_ALONE, (*hopper.W8A8_PAIRS, *hopper.W8A8_ALONE))
    w4a4 = (hopper.W4A4_ALONE, (*hopper.W4A4_SQUARES, *hopper.W4A4_ALONE))
    for kind in (w8a8, w4a4):
        taken = {hopper.choose(m, n, 132, shapes) for m, n in SHAPES.values() for shapes in kind}
        assert taken == {shape for shapes in kind for shape in shapes}


def draw(*shape, scale=1.0):
    return torch.randn(*shape, device="cuda") * scale


def codes_of(*shape, low, high, dtype):
    return torch.randint(low, high, shape, device="cuda").to(dtype)


def weights_of(name, n):
    branch = dict(smooth=torch.ones(K, device="cuda"), down=draw(R, K), up=draw(n, R, scale=0.3).bfloat16())
    branch["bias"] = draw(n).bfloat16()
    if name == "int8":
        codes = codes_of(n, K, low=-127, high=128, dtype=torch.int8)
        return LinearWeights(INT8, codes, torch.rand(n, 1, device="cuda") * 1e-3, **branch)
    codes = codes_of(n, K // 2, low=0, high=256, dtype=torch.uint8)
    if name == "nvfp4":
        scales = (torch.rand(n, K // 16, device="cuda") + 0.5).to(torch.float8_e4m3fn)
        return LinearWeights(NVFP4, codes, scales, torch.full((1,), 2.0**-6, device="cuda"), **branch)
    scales = ((torch.rand(n, K // 64, device="cuda") + 0.5) * 0.01).bfloat16()
    return LinearWeights(INT4, codes, scales, **branch)


def activations_of(name, m):
    """Codes, scales, hidden values."""
    hidden = draw(m, R)
    if name == "int8":
        codes = codes_of(m, K, low=-127, high=128, dtype=torch.int8)
        return codes, torch.rand(m, 1, device="cuda") * 1e-2, hidden
    if name == "nvfp4":
        scales = (torch.rand(m, K // 16, device="cuda") + 0.5).to(torch.float8_e4m3fn)
        return codes_of(m, K, low=0, high=16, dtype=torch.uint8), scales, hidden
    low, high, dtype = (-7, 8, torch.int8) if name == "int4" else (0, 16, torch.uint8)
    scales = (torch.rand(m, K // 64, device="cuda") + 0.5).bfloat16()
    return codes_of(m, K, low=low, high=high, dtype=dtype), scales, hidden


def exact(codes, scales, hidden, w):
    """In float64, of operands that are exact in fp32."""
    acts = (fp4.decode(codes) if w.spec.format == "nvfp4" else codes).double()
    acts *= scales.double().repeat_interleave(K // scales.shape[1], 1)
    if w.spec.format == "int8":
        weight = w.codes.double() * w.scales.double()
    elif w.spec.format == "nvfp4":
        weight = fp4.dequantize_weight(w.codes, w.scales, w.second_scale).double()
    else:
        weight = int4.dequantize_weight(w.codes, w.scales).double()
    return acts @ weight.T + hidden.double() @ w.up.double().T + w.bias.double()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4", "int4-unsigned", "nvfp4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_product(spelled, shape, name):
    if spelled.device.type == "cpu":
        pytest.skip("of GPUs")
    m, n = SHAPES[shape]
    weights, quantized = weights_of(name, n), activations_of(name, m)
    y = gemm(spelled.ops, *quantized, weights)
    assert_close(y, exact(*quantized, weights), spelled.tolerance)
    for _ in range(TIMES - 1):
        assert torch.equal(gemm(spelled.ops, *quantized, weights), y)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(gemm(spelled.ops, *quantized, weights, dtype=dtype), y.to(dtype))
