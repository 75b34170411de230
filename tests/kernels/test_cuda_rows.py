"""The CUDA products, emulated, as parts of a layer: outputs among others' columns, sums that join others."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.core.linear import Part
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, EmulatedOps
from svdquant_nodes.tests.kernels.test_spellings import W4A4, activations, quantize
from svdquant_nodes.tests.kernels.test_spellings_rows import judge_columns
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

SPELLINGS = {  # of which card, which layers
    "mma_sm75": (75, ["int4", "int4-unsigned"]),
    "mma_s4": (80, ["int4"]),
    "mma_s8": (90, ["int4", "int8-of-int4"]),
    "mma_f16": (80, ["nvfp4"]),
    "mxf4_sm120": (120, ["nvfp4"]),
    "wgmma_e4m3": (90, ["int4", "int4-unsigned"]),
    "wgmma_e4m3_x4": (90, ["int4", "int4-unsigned"]),
    "wgmma_s8": (90, ["int8-of-int4"]),
    "wgmma_s8_x2": (90, ["int8-of-int4"]),
    "gemv": (80, ["awq"]),
}
CASES = [(spelling, arch, name) for spelling, (arch, names) in SPELLINGS.items() for name in names]


@pytest.mark.parametrize("dtype", layers.DTYPES.values(), ids=layers.DTYPES)
@pytest.mark.parametrize(("m", "n"), [(3, 67), (131, 72)], ids=["few-tokens-odd-width", "two-rows-of-tiles"])
@pytest.mark.parametrize(("spelling", "arch", "name"), CASES)
def test_output_among_others(spelling, arch, name, m, n, dtype):
    if name == "awq":
        m = min(m, 9)
    ops, w = EmulatedOps(arch, spelling), layers.random_linear(name, n, 128, 16)
    x = activations(name, m, 128, torch.bfloat16)
    judge_columns(ops, (x,) if name == "awq" else quantize(reference, x, w), w, dtype)


@pytest.mark.parametrize("name", W4A4)
@pytest.mark.parametrize("beside", [False, True], ids=["below", "beside"])
def test_layer_of_parts(beside, name):
    """Both linears of a FLUX single block."""
    ops = EmulatedOps(120 if name == "nvfp4" else 80, "mxf4_sm120" if name == "nvfp4" else "mma_s4")
    first = layers.random_linear(name, 64, 128, 16)
    second = layers.random_linear(name, 64 if beside else 40, 192 if beside else 128, 8, seed=9)
    parts = [Part(first), Part(second, column=128) if beside else Part(second, row=64)]
    x = activations(name, 9, 320 if beside else 128, torch.bfloat16)
    got = linear.join(x, parts, ops, dtype=torch.bfloat16)
    assert_close(got, linear.join(x, parts, reference), "bf16_output")
