from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference, weight_only
from svdquant_nodes.svdquant.core.linear import Branch, Part
from svdquant_nodes.tests import layers, oracle
from svdquant_nodes.tests.tolerances import assert_close

ALL = slice(None)


def no_bias(w):
    return dataclasses.replace(w, bias=None)


def part(name, n, k, *, row=0, column=0, seed=0, dtype=torch.float32):
    return Part(no_bias(layers.random_linear(name, n, k, 16, dtype=dtype, seed=seed)), row, column)


def branch(rows, columns, n, k, *, rank=4, strength=1.0, seed=50, dtype=torch.float32):
    down = layers.random(rank, k, seed=seed, dtype=dtype, scale=k**-0.5)
    return Branch(down, layers.random(n, rank, seed=seed + 1, dtype=dtype), strength, rows, columns)


def kron(a, b, n, k, rank=None, *, rows=ALL, columns=ALL, strength=0.7, dtype=torch.float32):
    """An [a, b] factor times an [n, k] one, whole or thin."""
    first = layers.random(a, b, seed=80, dtype=dtype)
    if rank is None:
        return Branch(layers.random(n, k, seed=81, dtype=dtype), None, strength, rows, columns, first)
    down = layers.random(rank, k, seed=82, dtype=dtype)
    return Branch(down, layers.random(n, rank, seed=83, dtype=dtype), strength, rows, columns, first)


def dense(b):
    """A branch as a matrix, in float64."""
    d = oracle.values(b.down) if b.up is None else oracle.values(b.up) @ oracle.values(b.down)
    return b.strength * (d if b.kron is None else np.kron(oracle.values(b.kron), d))


def judge(x, parts, n, bias=None, branches=()):
    """The same layer in float64: parts by the oracle, branches as dense matrices."""
    y = np.zeros((x.shape[0], n))
    for p in parts:
        y[:, p.rows] += layers.forward(x[:, p.columns], p.weights)
    for b in branches:
        y[:, b.rows] += oracle.values(x)[:, b.columns] @ dense(b).T
    return y if bias is None else y + oracle.values(bias)


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("name", [*layers.FORMATS, *layers.EIGHT_BITS])
def test_one_linear_of_each_format(name, dtype):
    kind = layers.DTYPES[dtype]
    w = layers.random_linear(name, 96, 128, 16, dtype=kind)
    x = layers.random(5, 128, seed=9, dtype=kind)
    y = linear.linear(x, w, reference)
    assert y.dtype == torch.float32
    assert_close(y, layers.forward(x, w), "fp32_sum")


@pytest.mark.parametrize("following", ["int4", "int4-unsigned", "nvfp4"])
@pytest.mark.parametrize("dtype", layers.DTYPES)
def test_feed_forward_is_two_linears_with_a_gelu_between(dtype, following):
    """To the bit: what is between them is rounded as the host's own layers round it."""
    kind = layers.DTYPES[dtype]
    first = layers.random_linear(following.removesuffix("-unsigned"), 128, 64, 8, dtype=kind)
    second = layers.random_linear(following, 40, 128, 8, dtype=kind, seed=5)
    x = layers.random(7, 64, seed=9, dtype=kind)
    between = linear.linear(x, first, reference, dtype=kind)
    between = torch.nn.functional.gelu(between, approximate="tanh")
    want = linear.linear(between, second, reference, dtype=kind)
    assert torch.equal(linear.feed_forward(x, first, second, reference, dtype=kind), want)


@pytest.mark.parametrize("names", [("int4", "int4-unsigned"), ("nvfp4", "nvfp4")], ids=" ".join)
def test_feed_forward_against_exact_arithmetic(names):
    """fp32 activations, with the GELU of the textbook."""
    first, second = (
        layers.random_linear(name, n, k, 8, dtype=torch.float32, seed=n)
        for name, n, k in zip(names, (64, 32), (128, 64), strict=True)
    )
    x = layers.random(7, 128, seed=9)
    y = layers.forward(x, first)
    gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    want = layers.forward(torch.from_numpy(gelu).float(), second)
    assert_close(linear.feed_forward(x, first, second, reference), want, "fp32_sum")


@pytest.mark.parametrize("shape", [(128,), (2, 3, 128), (0, 128)], ids=str)
@pytest.mark.parametrize("loras", [0, 1], ids=["plain", "with-a-lora"])
@pytest.mark.parametrize("names", [("int4", "int4-unsigned"), ("nvfp4", "nvfp4")], ids=" ".join)
def test_a_pair_of_layers_is_both_forwards_with_the_gelu(names, shape, loras):
    """To the bit, bias and LoRA included."""
    bias = layers.random(64, seed=3, dtype=torch.bfloat16)
    first = linear.with_bias([part(names[0], 64, 128, dtype=torch.bfloat16)], bias)
    second = [part(names[1], 96, 64, seed=5, dtype=torch.bfloat16)]
    one = [branch(ALL, ALL, 64, 128)] * loras
    two = [branch(ALL, ALL, 96, 64, strength=0.5, seed=60)] * loras
    x = layers.random(*shape, seed=9, dtype=torch.bfloat16)
    between = linear.forward(x, first, None, one, reference)
    between = torch.nn.functional.gelu(between, approximate="tanh")
    want = linear.forward(between, second, None, two, reference)
    assert torch.equal(linear.forward_pair(x, (first, one), (second, two), reference), want)


DENSE = [Branch(layers.random(64, 64, seed=70), None, 1.0, ALL, ALL)]
TWO_PARTS = [part("int4", 32, 64), part("int4", 32, 64, row=32)]
ONE_PART = [part("int4", 64, 64)]
NO_PAIR = {
    "first-in-parts": ((TWO_PARTS, []), (ONE_PART, [])),
    "second-in-parts": ((ONE_PART, []), (TWO_PARTS, [])),
    "difference-on-the-first": ((ONE_PART, DENSE), (ONE_PART, [])),
    "difference-on-the-second": ((ONE_PART, []), (ONE_PART, DENSE)),
    "of-two-formats": ((ONE_PART, []), ([part("nvfp4", 64, 64)], [])),
    "of-8-bits": (([part("int8-of-int4", 64, 64)], []), ([part("int8-of-int4", 64, 64)], [])),
    "first-shifted": (([part("int4-unsigned", 64, 64)], []), (ONE_PART, [])),
}


@pytest.mark.parametrize(("first", "second"), NO_PAIR.values(), ids=NO_PAIR)
def test_what_cannot_be_computed_at_once_is_left_alone(first, second):
    assert linear.forward_pair(layers.random(2, 64, seed=9), first, second, reference) is None


@pytest.mark.parametrize("name", [*layers.FORMATS, *layers.EIGHT_BITS])
def test_ops_are_the_ones_given(name):
    """Every product comes from the op set that was handed in, and from nowhere else."""
    called = []

    class Spy:
        def __getattr__(self, op):
            called.append(op)
            return getattr(reference, op)

    w = layers.random_linear(name, 32, 64, 16)
    linear.linear(torch.zeros(1, 64), w, Spy())
    kind = name.partition("-of-")[0].replace("-", "_")
    want = {
        "awq": ["gemv_awq"],
        "nvfp4": ["gemm_nvfp4", "quantize_nvfp4"],
        "int8": ["gemm_int8", "quantize_int8"],
    }
    assert sorted(called) == want.get(kind, ["gemm_int4", f"quantize_{kind}"])


def test_parts_in_rows():
    """As FLUX single-block linear1: qkv above mlp, each with its own smooth, branch and codes."""
    parts = [part("int4", 96, 128, seed=1), part("int4", 64, 128, row=96, seed=10)]
    x = layers.random(5, 128, seed=2)
    assert_close(linear.forward(x, parts, None, [], reference), judge(x, parts, 160), "fp32_sum")


def test_parts_in_columns():
    """As FLUX single-block linear2: attention columns signed, GELU columns unsigned, outputs added."""
    parts = [part("int4", 96, 128, seed=1), part("int4-unsigned", 96, 192, column=128, seed=10)]
    x = layers.random(5, 320, seed=2)
    assert_close(linear.forward(x, parts, None, [], reference), judge(x, parts, 96), "fp32_sum")


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("ops", [reference, weight_only], ids=["reference", "weight-only"])
def test_parts_write_and_add_what_they_are_alone(ops, dtype):
    """To the bit: side by side as they would be concatenated, and summed in fp32 before one rounding."""
    kind = layers.DTYPES[dtype]
    below = [part("int4", 64, 128), part("nvfp4", 32, 128, row=64, seed=10), part("awq", 48, 128, row=96)]
    beside = [part("int4", 64, 128), part("nvfp4", 64, 64, column=128), part("awq", 64, 64, column=192)]
    x = layers.random(5, 256, seed=2, dtype=kind)
    alone = [linear.linear(x[:, :128], p.weights, ops, dtype=kind) for p in below]
    assert torch.equal(linear.join(x[:, :128], below, ops, dtype=kind), torch.cat(alone, dim=1))
    a, b, c = (linear.linear(x[:, p.columns], p.weights, ops) for p in beside)
    assert torch.equal(linear.join(x, beside, ops, dtype=kind), reference.rounded(a + b + c, kind))


def test_parts_of_every_format_in_rows():
    parts = [
        part("int4", 64, 128, seed=1),
        part("nvfp4", 32, 128, row=64, seed=10),
        part("awq", 48, 128, row=96, seed=20),
    ]
    x = layers.random(3, 128, seed=2)
    assert_close(linear.forward(x, parts, None, [], reference), judge(x, parts, 144), "fp32_sum")


BRANCHES = {
    "whole-layer": [branch(ALL, ALL, 160, 128)],
    "rows-of-k-in-qkv": [branch(slice(32, 64), ALL, 32, 128)],
    "columns": [branch(ALL, slice(64, 128), 160, 64)],
    "rows-and-columns": [branch(slice(96, 160), slice(0, 32), 64, 32)],
    "across-two-parts": [branch(slice(80, 120), ALL, 40, 128)],
    "half-strength": [branch(ALL, ALL, 160, 128, strength=0.5)],
    "negative-strength": [branch(ALL, ALL, 160, 128, strength=-1.25)],
    "zero-strength": [branch(ALL, ALL, 160, 128, strength=0.0)],
    "two-stacked": [branch(ALL, ALL, 160, 128), branch(slice(0, 96), ALL, 96, 128, strength=2.0, seed=60)],
    "bf16-pair": [branch(ALL, ALL, 160, 128, dtype=torch.bfloat16)],
    "dense-difference": [Branch(layers.random(64, 32, seed=70), None, 0.5, slice(96, 160), slice(32, 64))],
    "dense-bf16": [Branch(layers.random(160, 128, seed=71, dtype=torch.bfloat16), None, 0.3, ALL, ALL)],
    "rank-0": [branch(ALL, ALL, 160, 128, rank=0)],
    "kron-square": [kron(16, 16, 10, 8)],
    "kron-tall": [kron(80, 2, 2, 64)],
    "kron-wide": [kron(2, 64, 80, 2)],
    "kron-thin": [kron(8, 4, 20, 32, rank=3)],
    "kron-row": [kron(1, 128, 160, 1)],
    "kron-of-one": [kron(1, 1, 160, 128)],
    "kron-slice": [kron(4, 8, 12, 8, rows=slice(80, 128), columns=slice(64, 128))],
    "kron-bf16": [kron(8, 8, 20, 16, dtype=torch.bfloat16)],
    "kron-beside-a-pair": [kron(8, 8, 20, 16), branch(slice(0, 96), ALL, 96, 128)],
}


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_branches_against_dense(branches):
    parts = [part("int4", 96, 128, seed=1), part("nvfp4", 64, 128, row=96, seed=10)]
    x, bias = layers.random(5, 128, seed=2), layers.random(160, seed=3)
    y = linear.forward(x, parts, bias, branches, reference)
    assert_close(y, judge(x, parts, 160, bias, branches), "fp32_sum")


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_as_a_matrix(branches):
    for b in branches:
        assert b.difference().dtype == torch.float32
        assert_close(b.difference(), dense(b), "fp32_sum")
        assert_close(b.scaled(-3.0).difference(), -3 * dense(b), "fp32_sum")


def test_only_pairs_have_rank():
    """`absorb` may give a kernel what has rank, and a report counts it."""
    difference = Branch(layers.random(64, 32, seed=70), None, 1.0, ALL, ALL)
    assert [b.rank for b in (branch(ALL, ALL, 64, 32, rank=3), difference, kron(4, 2, 16, 16, rank=3))] == [
        3,
        0,
        0,
    ]


def test_a_kronecker_product_is_never_formed():
    """[64 x 64] (x) [64 x 64] would be a 4096 x 4096 matrix of 64 MB; through its factors it takes 32 KB."""
    b = kron(64, 64, 64, 64)
    x, y = layers.random(2, 4096, seed=2), torch.zeros(2, 4096)
    with torch.profiler.profile(profile_memory=True) as seen:
        linear.add_branches(y, x, [b])
    assert max(event.cpu_memory_usage for event in seen.events()) < 1 << 20
    assert_close(y, oracle.values(x) @ dense(b).T, "fp32_sum")


def test_a_branch_and_its_opposite_leave_nothing():
    parts = [part("int4", 64, 128, seed=1)]
    x = layers.random(4, 128, seed=2)
    pair = [branch(ALL, ALL, 64, 128, strength=s) for s in (0.75, -0.75)]
    plain = linear.forward(x, parts, None, [], reference)
    assert_close(linear.forward(x, parts, None, pair, reference), plain, "fp32_sum")


def test_a_branch_is_more_rank():
    """A LoRA beside the layer and the same LoRA inside its low-rank pair are one thing."""
    w = no_bias(layers.random_linear("int4", 64, 128, 16, dtype=torch.float32))
    lora = branch(ALL, ALL, 64, 128, strength=0.5)
    wider = dataclasses.replace(
        w, down=torch.cat([w.down, lora.down]), up=torch.cat([w.up, 0.5 * lora.up], dim=1)
    )
    x = layers.random(4, 128, seed=2)
    got = linear.forward(x, [Part(w)], None, [lora], reference)
    assert_close(got, linear.forward(x, [Part(wider)], None, [], reference), "fp32_sum")


def test_bias_is_added_once_whatever_the_parts():
    parts = [part("int4", 64, 64, seed=1), part("int4", 64, 64, column=64, seed=10)]
    x, bias = layers.random(3, 128, seed=2), layers.random(64, seed=3)
    y = linear.forward(x, parts, bias, [], reference)
    assert_close(y, judge(x, parts, 64, bias), "fp32_sum")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", layers.FORMATS)
def test_output_is_rounded_once_at_the_end(name, dtype):
    kind = layers.DTYPES[dtype]
    parts = [part(name, 64, 128, dtype=kind)]
    x, bias = layers.random(6, 128, seed=2, dtype=kind), layers.random(64, seed=3, dtype=kind)
    lora = [branch(ALL, ALL, 64, 128, dtype=kind)]
    y = linear.forward(x, parts, bias, lora, reference)
    assert y.dtype == kind
    assert_close(y, judge(x, parts, 64, bias, lora), f"{dtype}_output")


@pytest.mark.parametrize("shape", [(128,), (2, 3, 128), (1, 1, 1, 128), (0, 128), (2, 0, 128)], ids=str)
def test_leading_axes_are_kept(shape):
    parts = [part("int4", 64, 128)]
    x = layers.random(*shape, seed=2)
    y = linear.forward(x, parts, None, [branch(ALL, ALL, 64, 128)], reference)
    assert y.shape == (*shape[:-1], 64)
    flat = linear.forward(x.reshape(-1, 128), parts, None, [branch(ALL, ALL, 64, 128)], reference)
    assert torch.equal(y.reshape(-1, 64), flat)


def test_input_is_not_changed_and_may_be_a_view():
    parts, lora = [part("int4", 64, 128)], [branch(ALL, ALL, 64, 128)]
    wide = layers.random(5, 256, seed=2)
    view, copy = wide[:, ::2], wide.clone()
    got = linear.forward(view, parts, None, lora, reference)
    assert torch.equal(wide, copy)
    assert torch.equal(got, linear.forward(view.contiguous(), parts, None, lora, reference))


def test_runs_in_inference_mode():
    parts = [part("int4", 64, 128, seed=1), part("int4", 64, 128, row=64, seed=2)]
    x = layers.random(3, 128, seed=2)
    with torch.inference_mode():
        inside = linear.forward(x, parts, None, [branch(ALL, ALL, 128, 128)], reference)
    assert torch.equal(inside, linear.forward(x, parts, None, [branch(ALL, ALL, 128, 128)], reference))


def test_fp16_saturates_instead_of_overflowing():
    weights = part("int4", 64, 64, dtype=torch.float16)
    bias = torch.full((64,), 1e6)
    y = linear.forward(torch.ones(2, 64, dtype=torch.float16), [weights], bias, (), reference)
    assert torch.equal(y, torch.full_like(y, 65504.0))


# ---- branches as more rank ----


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_absorbed_branches_against_dense(branches):
    """Beside each other, too: a branch that reads both parts is in both."""
    parts = [part("int4", 160, 64, seed=1), part("int4-unsigned", 160, 64, column=64, seed=10)]
    x, bias = layers.random(5, 128, seed=2), layers.random(160, seed=3)
    y = linear.forward(x, parts, bias, branches, reference)
    assert_close(y, judge(x, parts, 160, bias, branches), "fp32_sum")


def test_what_has_rank_is_absorbed_and_the_rest_stays_beside():
    parts = [part("int4", 96, 128, seed=1), part("nvfp4", 64, 128, row=96, seed=10)]
    whole, upper = branch(ALL, ALL, 160, 128), branch(slice(0, 96), ALL, 96, 128)
    difference = Branch(layers.random(160, 128, seed=7), None, 1.0, ALL, ALL)
    product = kron(4, 2, 40, 64)
    wider, beside = linear.absorb(layers.random(1, 128, seed=0), parts, [whole, difference, upper, product])
    assert [p.weights.rank for p in wider] == [16 + 4 + 4, 16 + 4]
    assert beside == [difference, product]
    assert [p.weights.rank for p in parts] == [16, 16]


def test_awq_has_no_place_for_rank():
    parts, lora = [part("awq", 64, 128)], [branch(ALL, ALL, 64, 128)]
    assert linear.absorb(layers.random(1, 128, seed=0), parts, lora) == (parts, lora)
    x = layers.random(3, 128, seed=2)
    y = linear.forward(x, parts, None, lora, reference)
    assert_close(y, judge(x, parts, 64, None, lora), "fp32_sum")


@pytest.mark.parametrize(("acts", "kept"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_down_of_a_fine_pair_is_rounded_where_the_output_is(acts, kept):
    parts, lora = [part("int4", 64, 128, dtype=torch.bfloat16)], [branch(ALL, ALL, 64, 128)]
    (wider,), _ = linear.absorb(layers.random(1, 128, seed=0, dtype=layers.DTYPES[acts]), parts, lora)
    assert wider.weights.down.dtype == kept and wider.weights.up.dtype == torch.float32


def test_the_up_of_a_16_bit_pair_stays_in_16_bits():
    """Kernels read it in wide pieces then; the strength is in `down`."""
    parts = [part("int4", 64, 128, dtype=torch.bfloat16)]
    pair = dataclasses.replace(branch(ALL, ALL, 64, 128).map(lambda t: t.bfloat16()), strength=0.3)
    (wider,), _ = linear.absorb(layers.random(1, 128, seed=0, dtype=torch.bfloat16), parts, [pair])
    assert wider.weights.up.dtype == torch.bfloat16 and torch.equal(wider.weights.up[:, 16:], pair.up)
    assert torch.equal(wider.weights.down[16:], (pair.down.float() * 0.3).bfloat16())
