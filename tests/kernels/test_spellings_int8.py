"""What is special about 8 bits, in every spelling: one scale a token, and sums that are integers, exact to the bit.

Whole layers of 8 bits are among the cases of test_spellings.py.
"""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.core.weights import INT8, LinearWeights
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.test_spellings import same_bits


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("shift", [0.0, 0.171875], ids=["as-it-is", "shifted"])
def test_every_tie_of_int8(spelled, shift, dtype):
    """Absmax 63.5 gives scale 1/2 and odd quarters are the ties; the largest stands in each place of a vector."""
    kind = layers.DTYPES[dtype]
    x = (torch.arange(-63, 64) / 4).repeat(48, 2)[:, :240].to(kind)
    x[torch.arange(48), torch.arange(48) * 5] = 63.5
    one, none = torch.ones(240, dtype=kind), torch.zeros(0, 240, dtype=kind)
    codes, scales, _ = spelled.ops.quantize_int8(*map(spelled.here, (x, one, none)), shift)
    want_codes, want_scales, _ = reference.quantize_int8(x, one, none, shift)
    same_bits(codes, want_codes)
    same_bits(scales, want_scales)
    if not shift:  # -62/2, -61/2 to even, -60/2, ...
        assert codes[47, 1:8].tolist() == [-31, -30, -30, -30, -29, -28, -28]


def int8_codes(*shape, seed):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def int8_weights(codes, scale=1.0):
    """Nothing but codes: no branch, no bias, a scale that loses nothing."""
    n, k = codes.shape
    none = dict(smooth=torch.ones(k), down=torch.zeros(0, k), up=torch.zeros(n, 0))
    return LinearWeights(INT8, codes, torch.full((n, 1), scale), **none)


@pytest.mark.parametrize("k", [16, 48, 80, 1040, 12288], ids="k={}".format)
@pytest.mark.parametrize(
    ("m", "n"), [(1, 17), (7, 40), (261, 33)], ids=["one-token", "a-tile", "strip-and-five"]
)
def test_int8_sums_are_exact(spelled, m, n, k):
    """To the last bit of the integer's fp32, whose largest is K * 127 * 127."""
    a, b = int8_codes(m, k, seed=1), int8_codes(n, k, seed=2)
    a[0], b[0], b[1] = 127, 127, -127
    want = (a.double() @ b.double().T).float() * 0.25
    scales, hidden = torch.full((m, 1), 0.5), torch.zeros(m, 0)
    y = spelled.ops.gemm_int8(*map(spelled.here, (a, scales, hidden)), spelled.weights(int8_weights(b, 0.5)))
    assert want[0, 0] == k * 127 * 127 / 4 and torch.equal(y.cpu(), want)


@pytest.mark.parametrize("k", [1, 5, 31, 67], ids="k={}".format)
def test_int8_products_of_any_k(spelled, k):
    """A CPU's spellings fill K up; a GPU's say what they need."""
    if spelled.device.type != "cpu":
        pytest.skip("16 columns at a time")
    a, b = int8_codes(6, k, seed=1), int8_codes(19, k, seed=2)
    y = spelled.ops.gemm_int8(a, torch.ones(6, 1), torch.zeros(6, 0), int8_weights(b))
    assert torch.equal(y, (a.double() @ b.double().T).float())


def test_every_pair_of_int8_codes(spelled):
    """All 255 of one side against all 255 of the other, in one place of 64 after the other."""
    every = torch.arange(-127, 128).to(torch.int8)
    a, b = torch.zeros(255, 64, dtype=torch.int8), torch.zeros(255, 64, dtype=torch.int8)
    for column in (0, 1, 2, 3, 30, 63):
        a.zero_()[:, column], b.zero_()[:, column] = every, every
        args = map(spelled.here, (a, torch.ones(255, 1), torch.zeros(255, 0)))
        y = spelled.ops.gemm_int8(*args, spelled.weights(int8_weights(b)))
        assert torch.equal(y.cpu(), torch.outer(every.float(), every.float()))
