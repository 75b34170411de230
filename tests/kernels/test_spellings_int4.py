"""What is special about 4-bit integers, in every spelling: a group's sum is an integer, exact to the bit.

Also where a card carries them by floats, which keep some 13 bits while they add: with the largest sums there are, with
sums that nearly cancel, and with ones beside large products. More tokens than one row of tiles: on Hopper that is
another kernel.
"""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import int4
from svdquant_nodes.svdquant.core.weights import INT4, LinearWeights

M, N = 140, 72
LARGEST = {"int4": -8, "int4-unsigned": 15}


def codes_of(name, k):
    """Random rows, then all of the largest magnitude, then that with one 1, at the end of a group or at its start."""
    low, high, dtype = (-8, 8, torch.int8) if name == "int4" else (0, 16, torch.uint8)
    codes = torch.randint(low, high, (M, k), generator=torch.Generator().manual_seed(1)).to(dtype)
    codes[131:] = LARGEST[name]
    codes[132, 63::64] = codes[133, ::64] = 1
    codes[134, 1::2] = codes[135, 32:] = 0 if name == "int4-unsigned" else 7
    codes[136] = 0
    return codes


def weights_of(k):
    codes = torch.randint(-8, 8, (N, k), generator=torch.Generator().manual_seed(2))
    codes[64:] = -8
    codes[65, 63::64] = codes[66, ::64] = 1
    codes[67, 1::2] = codes[68, 1::2] = 7
    codes[68, 1] = 6
    one, none = torch.ones(N, k // 64), torch.zeros(N, 0)
    return LinearWeights(
        INT4, int4.pack_nibbles(codes), one, smooth=torch.ones(k), down=torch.zeros(0, k), up=none
    )


@pytest.mark.parametrize("k", [64, 128, 192, 1088], ids="k={}".format)
@pytest.mark.parametrize("name", LARGEST)
def test_group_sums_are_exact(spelled, name, k):
    codes, weights = codes_of(name, k), weights_of(k)
    want = (codes.double() @ int4.unpack_signed(weights.codes).double().T).float()
    scales, hidden = torch.ones(M, k // 64), torch.zeros(M, 0)
    y = spelled.ops.gemm_int4(*map(spelled.here, (codes, scales, hidden)), spelled.weights(weights))
    assert want.abs().max() == k * 8 * abs(LARGEST[name])
    assert torch.equal(y.cpu(), want)
