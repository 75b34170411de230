"""The quantizers' short division of 16-bit numbers: for every pair, what becomes of it is what a true one becomes.

Reciprocals are two units off either way, more than a card's are. Exponents scale both sides alike, so one of the
divisor's is enough.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from svdquant_nodes.tests.kernels.emulated import COMPILER, library

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

BITS = {"bf16": 7, "fp16": 10}  # of a mantissa
LARGEST = {"int4": 7, "int4-unsigned": 15, "int8": 127}  # code
OFF = (-2, -1, 0, 1, 2)  # units in the last place


def mantissas(bits):
    return 1 + torch.arange(2**bits) / 2**bits


def off_by(units, values):
    return (values.view(torch.int32) + units).view(torch.float32)


def divide_by(a, b, reciprocal):
    a, b, reciprocal = (t.contiguous() for t in torch.broadcast_tensors(a, b, reciprocal))
    got = torch.empty_like(a)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, reciprocal, got)]
    library(80).divide_each_by(*pointers, ctypes.c_int64(a.numel()))
    return got


@pytest.mark.parametrize("largest", LARGEST.values(), ids=LARGEST)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_every_code(bits, largest):
    most = mantissas(bits).unsqueeze(1)
    alpha = most * torch.tensor(1 / largest)
    for exponent in range(largest.bit_length() + 3):  # smaller numbers become the code 0
        x = mantissas(bits) * 2.0**-exponent
        want = torch.round(x / alpha)
        for units in OFF:
            got = torch.round(divide_by(x, alpha, off_by(units, 1 / alpha)))
            assert torch.equal(got[x <= most], want[x <= most])
        assert want[x <= most].max() <= largest


@pytest.mark.parametrize("exponent", [0, -1, -14, -15, -20, -25], ids=lambda e: f"2^{e}")
def test_every_quotient_in_fp16(exponent):
    x, by = mantissas(10) * 2.0**exponent, mantissas(10).unsqueeze(1)
    for units in OFF:
        got = divide_by(x, by, off_by(units, 1 / by))
        assert torch.equal(got.half(), (x / by).half())


def test_every_quotient_in_bf16_by_a_product():
    x, by = mantissas(7), mantissas(7).unsqueeze(1)
    for units in OFF:
        assert torch.equal((x * off_by(units, 1 / by)).bfloat16(), (x / by).bfloat16())
