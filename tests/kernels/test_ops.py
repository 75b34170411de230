"""The op set as torch and its callers see it: signatures, schemas, fake kernels, torch.compile, fallbacks, errors."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference, weight_only
from svdquant_nodes.svdquant.core.linear import Branch, Part
from svdquant_nodes.svdquant.kernels import ops, select
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.tolerances import assert_close
from svdquant_nodes.tools.pack import ROOT

pytestmark = pytest.mark.usefixtures("kernels")
ALL = slice(None)


def inputs(name, m=5, n=40, k=128, r=8):
    return layers.random(m, k, seed=3, dtype=torch.bfloat16), layers.random_linear(name, n, k, r)


def calls(name):
    """Every torch op of a format with arguments: yields (op, args). Codes are the reference's: it needs no kernels."""
    x, w = inputs(name)
    space, out, addend = torch.ops.svdquant, torch.empty(5, 40), layers.random(5, 40, seed=4)
    if name == "awq":
        yield space.gemv_awq, (x, w.codes, w.scales, w.zeros, w.bias, addend, out, "portable")
        yield space.gemv_awq, (x, w.codes, w.scales, w.zeros, None, None, out.bfloat16(), "portable")
        return
    eight_bits = w.spec.format == "int8"
    shift = (w.spec.act_shift,) if w.spec.act_shift or eight_bits else ()
    quantize = "quantize_int8" if eight_bits else f"quantize_{name.replace('-', '_')}"
    arguments = (x, w.smooth, w.down, *shift)
    yield getattr(space, quantize), (*arguments, "portable")
    made = getattr(reference, quantize)(*arguments)
    if name == "nvfp4":
        yield (
            space.gemm_nvfp4,
            (*made, w.codes, w.scales, w.second_scale, w.up, w.bias, addend, out, "portable"),
        )
    else:
        gemm = space.gemm_int8 if eight_bits else space.gemm_int4
        wide = torch.empty(5, 50)[:, 3:43]
        yield gemm, (*made, w.codes, w.scales, w.up, w.bias, None, wide, "portable")


@pytest.mark.parametrize("name", select.OPS)
def test_signatures_are_those_of_the_reference(name):
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_opcheck(name):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for op, arguments in calls(name):
        eight_bits = any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments)
        # the schema check computes with its arguments, which torch cannot do with eight-bit floats
        torch.library.opcheck(op, arguments, test_utils=checks + ["test_schema"] * (not eight_bits))


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_compiles_without_a_break(name):
    """A layer with a branch is a whole graph, for any number of tokens, and our ops stand in it by name."""
    x, w = inputs(name)
    lora = Branch(layers.random(4, 128, seed=1), layers.random(40, 4, seed=2), 0.5, ALL, ALL)

    def layer(x):
        return linear.forward(torch.nn.functional.silu(x), (Part(w),), None, (lora,), ops)

    ours = []

    def backend(graph, _):
        ours.append(sum(str(node.target).startswith("svdquant.") for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for tokens in (5, 3):
            assert torch.equal(compiled(x[:tokens]), layer(x[:tokens]))
    assert set(ours) == {1 if name == "awq" else 2}


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_parts_compile_without_a_break(name):
    """Products that write into columns of one output and add to another's, once torch has made functions of them."""
    made = [layers.random_linear(name, 64, 64, 8, seed=seed) for seed in range(4)]
    below, beside = (Part(made[0]), Part(made[1], row=64)), (Part(made[2]), Part(made[3], column=64))

    def block(x):
        y = linear.forward(torch.nn.functional.silu(x), below, None, (), ops)
        return x + linear.forward(torch.nn.functional.silu(y), beside, None, (), ops), y

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    x = layers.random(5, 64, seed=3, dtype=torch.bfloat16)
    with torch.no_grad():
        for tokens in (5, 3):
            got, want = compiled(x[:tokens]), block(x[:tokens])
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_runs_in_inference_mode(name):
    x, w = inputs(name)
    with torch.inference_mode():
        inside = linear.linear(x, w, ops)
    assert torch.equal(inside, linear.linear(x, w, ops))


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_activations_may_be_a_view(name):
    """Columns of a wider tensor, as a part of a host layer reads them, and every second column."""
    x = inputs(name, k=256)[0]
    narrow = layers.random_linear(name, 40, 128, 8)
    for view in (x[:, 64:192], x[:, ::2], x.t().contiguous().t()[:, :128]):
        assert torch.equal(linear.linear(view, narrow, ops), linear.linear(view.contiguous(), narrow, ops))


@pytest.mark.parametrize("sizes", [(300, 100, 192), (1, 4096, 192)], ids=["picture", "one-token"])
@pytest.mark.parametrize("name", layers.COMPUTED)
def test_the_number_of_threads_changes_no_bit(name, sizes):
    x, w = inputs(name, *sizes)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear.linear(x, w, ops))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- where the reference runs ----


def test_double_precision_goes_to_the_reference():
    x, w = inputs("int4")
    got = ops.quantize_int4(x.double(), w.smooth, w.down)
    want = reference.quantize_int4(x.double(), w.smooth, w.down)
    assert got[1].dtype == torch.float64 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_other_devices_multiply_without_quantizing_activations():
    x, w = inputs("int4")
    on_meta = dataclasses.replace(w, **{name: t.to("meta") for name, t in w.tensors().items()})
    made = ops.quantize_int4(x.to("meta"), on_meta.smooth, on_meta.down)
    assert made[0].is_meta and made[0].dtype == x.dtype and made[1] is None
    assert ops.gemm_int4(*made, on_meta).shape == (5, w.out_features)


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_weight_only_by_name(name):
    x, w = inputs(name)
    expected = linear.linear(x, w, weight_only)
    assert torch.equal(linear.linear(x, w, ops.OpSet("weight_only")), expected)


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_off_is_the_reference(name):
    x, w = inputs(name)
    assert torch.equal(linear.linear(x, w, ops.OpSet("off")), linear.linear(x, w, reference))


def test_describe_names_the_spelling_and_the_reasons():
    text = ops.describe("cpu")
    assert text.split()[0] in {row.name for row in select.SPELLINGS if row.device == "cpu"}
    assert ops.describe("meta") == "weight_only (not kernels: none is written for gemm_int4 on meta)"


def test_a_second_copy_of_the_pack_shares_the_ops():
    """Two copies in custom_nodes: the second finds the schemas defined and uses them."""
    code = """
import importlib.util, sys, types
for name in ("first", "second"):
    module = types.ModuleType(name); module.__path__ = [sys.argv[1]]; sys.modules[name] = module
from first.svdquant.kernels import ops as a
from second.svdquant.kernels import ops as b
assert a is not b and a.library is not b.library
"""
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)


# ---- errors ----


def test_no_such_spelling_on_this_processor():
    x, w = inputs("int4")
    with pytest.raises(RuntimeError, match="spelling 'abacus': this processor has no such spelling"):
        torch.ops.svdquant.quantize_int4(x, w.smooth, w.down, "abacus")


def change(arguments, index, value):
    return (*arguments[:index], value, *arguments[index + 1 :])


BAD = {  # format, which op of `calls`, argument, value, message
    "k-not-a-group": ("int4", 0, 0, torch.zeros(2, 96), "last axis is 96, expected a multiple of 64"),
    "x-not-a-matrix": ("int4", 0, 0, torch.zeros(128), r"x: expected \[M, K\]"),
    "x-of-integers": ("int4", 0, 0, torch.zeros(2, 128).int(), "x: expected a float"),
    "smooth-too-short": ("int4", 0, 1, torch.ones(64), r"smooth: expected shape \[128\], got \[64\]"),
    "down-of-other-k": ("nvfp4", 0, 2, torch.ones(8, 64), r"down: expected \[R, 128\], got \[8, 64\]"),
    "codes-of-floats": ("int4", 1, 0, torch.zeros(5, 128), "codes: expected int8 or uint8"),
    "codes-of-other-k": ("int4", 1, 0, torch.zeros(5, 64).char(), r"codes: expected shape \[5, 128\]"),
    "scales-of-other-m": ("int4", 1, 1, torch.ones(4, 2), r"scales: expected shape \[5, 2\]"),
    "hidden-of-other-rank": ("int4", 1, 2, torch.ones(5, 7), r"hidden: expected shape \[5, 8\]"),
    "hidden-of-halves": (
        "int4",
        1,
        2,
        torch.ones(5, 8).half(),
        "hidden: expected (Float|float32), got (Half|float16)",
    ),
    "weights-not-packed": ("int4", 1, 3, torch.zeros(40, 128), "weight_codes: expected packed uint8"),
    "weight-scales-of-other-n": ("int4", 1, 4, torch.ones(39, 2), r"weight_scales: expected shape \[40, 2\]"),
    "second-scale-of-other-n": ("nvfp4", 1, 5, torch.ones(39), "second_scale: expected 1 or 40"),
    "up-of-other-n": ("nvfp4", 1, 6, torch.ones(39, 8), r"up: expected shape \[40, 8\]"),
    "bias-of-other-n": ("int4", 1, 6, torch.ones(39), r"bias: expected shape \[40\]"),
    "addend-of-halves": (
        "int4",
        1,
        7,
        torch.ones(5, 40).half(),
        "addend: expected (Float|float32), got (Half|float16)",
    ),
    "addend-of-other-n": ("int4", 1, 7, torch.ones(5, 39), r"addend: expected shape \[5, 40\]"),
    "output-of-other-n": ("int4", 1, 8, torch.ones(5, 39), r"out: expected shape \[5, 40\], got \[5, 39\]"),
    "output-of-eight-bits": (
        "int4",
        1,
        8,
        torch.ones(5, 40).to(torch.float8_e4m3fn),
        "out: expected fp32, bf16 or",
    ),
    "output-of-columns": ("int4", 1, 8, torch.ones(40, 5).T, r"out: expected rows .* got strides \[1, 5\]"),
    "output-of-one-row": (
        "nvfp4",
        1,
        9,
        torch.ones(1, 40).expand(5, -1),
        r"none over another, got strides \[0, 1",
    ),
    "int8-k-not-16-columns": (
        "int8-of-int4",
        0,
        0,
        torch.zeros(2, 72),
        "last axis is 72, expected a multiple of 16",
    ),
    "int8-smooth-too-short": (
        "int8-of-int4",
        0,
        1,
        torch.ones(64),
        r"smooth: expected shape \[128\], got \[64\]",
    ),
    "int8-codes-unsigned": (
        "int8-of-int4",
        1,
        0,
        torch.zeros(5, 128).byte(),
        "codes: expected (Char|int8), got (Byte|uint8)",
    ),
    "int8-codes-of-other-k": (
        "int8-of-int4",
        1,
        0,
        torch.zeros(5, 64).char(),
        r"codes: expected shape \[5, 128\]",
    ),
    "int8-scales-of-halves": (
        "int8-of-int4",
        1,
        1,
        torch.ones(5, 1).half(),
        "scales: expected (Float|float32), got (Half|float16)",
    ),
    "int8-scales-by-groups": ("int8-of-int4", 1, 1, torch.ones(5, 2), r"scales: expected shape \[5, 1\]"),
    "int8-hidden-of-other-rank": ("int8-of-int4", 1, 2, torch.ones(5, 7), r"hidden: expected shape \[5, 8\]"),
    "int8-weights-packed": (
        "int8-of-int4",
        1,
        3,
        torch.zeros(40, 64).byte(),
        "weight_codes: expected (Char|int8), got",
    ),
    "int8-weights-not-a-matrix": (
        "int8-of-int4",
        1,
        3,
        torch.zeros(128).char(),
        r"weight_codes: expected \[N, K\]",
    ),
    "int8-weight-scales-by-groups": (
        "int8-of-int4",
        1,
        4,
        torch.ones(40, 2),
        r"weight_scales: expected shape \[40, 1",
    ),
    "int8-up-of-other-n": ("int8-of-int4", 1, 5, torch.ones(39, 8), r"up: expected shape \[40, 8\]"),
    "int8-bias-of-other-n": ("int8-of-int4", 1, 6, torch.ones(39), r"bias: expected shape \[40\]"),
    "int8-output-of-integers": ("int8-of-int4", 1, 8, torch.ones(5, 40).int(), "out: expected fp32, bf16 or"),
    "x-of-no-columns": ("int4", 0, 0, torch.zeros(5, 0), "x: last axis is 0, expected a multiple of 64"),
    "weights-of-no-columns": (
        "int4",
        1,
        3,
        torch.zeros(40, 0).byte(),
        "weight_codes: expected columns, got none",
    ),
    "int8-weights-of-no-columns": (
        "int8-of-int4",
        1,
        3,
        torch.zeros(40, 0).char(),
        "weight_codes: expected columns, got none",
    ),
    "awq-output-of-integers": ("awq", 0, 6, torch.ones(5, 40).int(), "out: expected fp32, bf16 or fp16"),
    "awq-x-of-other-k": ("awq", 0, 0, torch.zeros(5, 64), r"x: expected shape \[5, 128\]"),
    "awq-uneven-groups": ("awq", 0, 2, torch.ones(40, 3), "weight_scales: expected one for every 64"),
    "awq-zeros-of-other-n": ("awq", 0, 3, torch.ones(39, 2), r"zeros: expected shape \[40, 2\]"),
}


@pytest.mark.parametrize(("name", "which", "index", "value", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(name, which, index, value, message):
    op, arguments = list(calls(name))[which]
    with pytest.raises(ValueError, match=message):
        op(*change(arguments, index, value))


def test_host_layer_runs_on_the_kernels():
    """Parts beside and below each other with a LoRA: the same as with the reference ops."""
    import dataclasses

    def bare(name, n, k, seed):
        return dataclasses.replace(layers.random_linear(name, n, k, 8, seed=seed), bias=None)

    parts = [Part(bare("int4", 64, 128, 1)), Part(bare("int4-unsigned", 64, 192, 2), column=128)]
    lora = Branch(layers.random(4, 320, seed=1), layers.random(64, 4, seed=2), 0.5, ALL, ALL)
    x, bias = layers.random(2, 7, 320, seed=5), layers.random(64, seed=6)
    got = linear.forward(x, parts, bias, [lora], ops)
    assert_close(got, linear.forward(x, parts, bias, [lora], reference), "fp32_sum")
