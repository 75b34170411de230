"""Two layers finished together give the bits of each by itself with the host's lines between."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import gelu

from svdquant_nodes.svdquant.core import linear, reference, tail
from svdquant_nodes.svdquant.core.linear import Branch, Part
from svdquant_nodes.svdquant.core.sharing import Input, Reader, Slot
from svdquant_nodes.tests import layers

ALL = slice(None)
K, ATTENTION, MLP, N = 128, 64, 192, 96  # of linear1's input; of linear2's columns; of its output


def part(name, n, k, dtype, *, row=0, column=0, seed=0):
    weights = layers.random_linear(name, n, k, 8, dtype=dtype, seed=seed)
    return Part(dataclasses.replace(weights, bias=None), row, column)


def pair(dtype=torch.bfloat16, heads=1, following="int4-unsigned"):
    """[qkv; mlp], its first part in `heads` rows of parts, and [proj | mlp], each with a bias."""
    signed = following.removesuffix("-unsigned")
    firsts = [part(signed, ATTENTION, K, dtype, row=ATTENTION * i, seed=i) for i in range(heads)]
    firsts += [part(signed, MLP, K, dtype, row=ATTENTION * heads, seed=20)]
    seconds = [part(signed, N, ATTENTION, dtype, seed=30)]
    seconds += [part(following, N, MLP, dtype, column=ATTENTION, seed=40)]
    biases = (layers.random(n, seed=50 + n, dtype=dtype) for n in (ATTENTION * heads + MLP, N))
    return [linear.with_bias(parts, bias) for parts, bias in zip((firsts, seconds), biases, strict=True)]


def branch(n, k, rows=ALL, columns=ALL, *, strength=0.5, seed=60):
    down = layers.random(4, k, seed=seed, dtype=torch.bfloat16, scale=k**-0.5)
    return Branch(down, layers.random(n, 4, seed=seed + 1, dtype=torch.bfloat16), strength, rows, columns)


def apart(x, first, second, attend, branches=((), ()), ops=reference):
    y = linear.forward(x, first, None, branches[0], ops)
    qkv, mlp = torch.split(y, [y.shape[-1] - MLP, MLP], dim=-1)
    y = torch.cat((attend(qkv), gelu(mlp, approximate="tanh")), dim=-1)
    return linear.forward(y, second, None, branches[1], ops)


def together(x, first, second, attend, branches=((), ()), ops=reference, slot=None):
    qkv, quantized = tail.begin(x, (first, branches[0]), ops, slot)
    return tail.finish(attend(qkv), quantized, (first, branches[0]), (second, branches[1]), ops)


def attend(qkv):
    return torch.sin(qkv[..., :ATTENTION])


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("following", ["int4", "int4-unsigned", "nvfp4"])
@pytest.mark.parametrize("heads", [1, 3], ids=["qkv", "q-k-v"])
def test_the_bits_of_each_by_itself(dtype, following, heads):
    kind = layers.DTYPES[dtype]
    first, second = pair(kind, heads, following)
    x = layers.random(2, 5, K, seed=9, dtype=kind)
    got = together(x, first, second, attend)
    assert got.dtype == kind and torch.equal(got, apart(x, first, second, attend))


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (0, K)], ids=str)
def test_any_shape(shape):
    x = layers.random(*shape, seed=9, dtype=torch.bfloat16)
    assert torch.equal(together(x, *pair(), attend), apart(x, *pair(), attend))


ROWS, COLUMNS = ATTENTION + MLP, ATTENTION + MLP
BRANCHES = {
    "on-the-first": ([branch(ROWS, K)], []),
    "on-its-qkv": ([branch(ATTENTION, K, slice(0, ATTENTION))], []),
    "on-its-mlp": ([branch(MLP, K, slice(ATTENTION, None))], []),
    "on-the-second": ([], [branch(N, COLUMNS)]),
    "on-its-proj": ([], [branch(N, ATTENTION, ALL, slice(0, ATTENTION))]),
    "on-its-mlp-columns": ([], [branch(N, MLP, ALL, slice(ATTENTION, None))]),
    "on-both": ([branch(ROWS, K), branch(64, K, slice(32, 96), seed=70)], [branch(N, COLUMNS, seed=80)]),
}


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_loras(branches):
    first, second = pair()
    x = layers.random(2, 5, K, seed=9, dtype=torch.bfloat16)
    want = apart(x, first, second, attend, branches)
    assert torch.equal(together(x, first, second, attend, branches), want)
    assert not torch.equal(want, apart(x, first, second, attend))


@pytest.mark.parametrize("branches", [[], [branch(ROWS, K)]], ids=["plain", "with-a-lora"])
def test_what_was_left_out_alone(branches):
    first, _ = pair()
    x = layers.random(5, K, seed=9, dtype=torch.bfloat16)
    y, quantized = tail.begin(x, (first, branches), reference, None)
    whole = torch.cat((y, tail.rest(quantized, (first, branches), reference, x.dtype)), dim=-1)
    assert torch.equal(whole, linear.forward(x, first, None, branches, reference))


def test_an_input_quantized_alike_is_quantized_once():
    first, second = pair()
    shared = Input("linear1", 2)
    like = first[0].weights
    first = [
        dataclasses.replace(
            p,
            weights=dataclasses.replace(p.weights, smooth=like.smooth, down=like.down),
            reader=Reader(shared, i),
        )
        for i, p in enumerate(first)
    ]
    calls = []

    class Counting:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(reference, name)

    x = layers.random(5, K, seed=9, dtype=torch.bfloat16)
    got = together(x, first, second, attend, ops=Counting(), slot=Slot())
    assert torch.equal(got, apart(x, first, second, attend))
    assert calls == [
        "quantize_int4",
        "gemm_int4",
        "quantize_int4",
        "gemm_int4",
        "gemm_int4_gelu",
        "gemm_int4",
    ]


def dense(n, k):
    return [Branch(layers.random(n, k, seed=70), None, 1.0, ALL, ALL)]


def test_a_difference_is_not_taken():
    first, second = pair()
    x = layers.random(5, K, seed=9, dtype=torch.bfloat16)
    assert tail.begin(x, (first, dense(ROWS, K)), reference, None) is None
    assert together(x, first, second, attend, ([], dense(N, COLUMNS))) is None


SPECS = {
    "int4": ("int4", "int4", "gemm_int4_gelu"),
    "as-published": ("int4", "int4-unsigned", "gemm_int4_gelu"),
    "nvfp4": ("nvfp4", "nvfp4", "gemm_nvfp4_gelu"),
    "shifted-before": ("int4-unsigned", "int4", None),
    "nvfp4-behind": ("int4", "nvfp4", None),
    "awq": ("awq", "awq", None),
}


@pytest.mark.parametrize(("one", "two", "op"), SPECS.values(), ids=SPECS)
def test_which_are_fused(one, two, op):
    assert linear.fused_op(layers.spec_of(one), layers.spec_of(two)) == op
