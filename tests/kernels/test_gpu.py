"""Layers on a GPU as a host runs them: devices, streams, graphs, torch.compile, LoRAs, and every number of tokens.

What each op computes is judged for every spelling in test_spellings.py; here it is how they are called.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.core.linear import Branch, Part
from svdquant_nodes.svdquant.core.sharing import Input, Reader, Slot
from svdquant_nodes.svdquant.kernels import carrier, ops, select, selftest, trial
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels import test_ops, test_spellings
from svdquant_nodes.tests.tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_kernels")]
ALL = slice(None)
TOKENS = [0, 1, 2, 17, 64, 129]


def on_gpu(thing):
    """The same tensor, weights, part or branch on the GPU."""
    if isinstance(thing, torch.Tensor):
        return thing.cuda()
    tensors = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
    moved = {name: on_gpu(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    if isinstance(thing, Part):
        moved["weights"] = on_gpu(thing.weights)
    return dataclasses.replace(thing, **moved)


def layer(name, n=200, k=256, seed=0, dtype=torch.bfloat16):
    """A host's layer of one part, its input's maker, and its bias."""
    weights = layers.random_linear(name, n, k, 32, dtype=dtype, seed=seed)
    return Part(dataclasses.replace(weights, bias=None)), layers.random(n, seed=9, dtype=dtype)


def tokens(name, m, k=256, dtype=torch.bfloat16, seed=7):
    x = layers.random(m, k, seed=seed, dtype=dtype)
    return torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype) if "unsigned" in name else x


def forward(x, part, bias, branches=()):
    return linear.forward(on_gpu(x), [on_gpu(part)], on_gpu(bias), [on_gpu(b) for b in branches], ops)


def lora(n=200, k=256, rows=ALL, columns=ALL, rank=16, dtype=torch.bfloat16):
    height, width = len(range(n)[rows]), len(range(k)[columns])
    down = layers.random(rank, width, seed=1, dtype=dtype, scale=width**-0.5)
    return Branch(down, layers.random(height, rank, seed=2, dtype=dtype), 0.75, rows, columns)


@pytest.mark.parametrize("op", select.LAYER_OPS)
def test_a_kernel_is_chosen(op):
    """Nothing below would fail if plain torch ran instead."""
    assert ops.choose(select.Request(op, "bfloat16"), "cuda").spelling not in ops.PLAIN


@pytest.mark.parametrize(
    "row", [row for row in select.SPELLINGS if row.device == "cuda"], ids=lambda row: row.name
)
def test_the_self_test_passes(row):
    """What ended the self-test's own process fails here, and is left out everywhere else."""
    here = ops.device("cuda")
    if row not in select.to_try(here):
        pytest.skip(row.needs(here))
    assert row.name not in here.distrusted, "it ended the process of its self-test"
    tried = trial.Trial(here, row.name)
    assert selftest.problem(tried, torch.device("cuda", 0), row.ops, row.dtypes) is None


def test_the_library_lists_the_rows_of_the_table():
    listed = torch.ops.svdquant.spellings(torch.empty(0, device="cuda")).split()
    here = ops.device("cuda")
    assert set(listed) == {row.name for row in select.to_try(here) if row.library}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("m", TOKENS, ids="m={}".format)
@pytest.mark.parametrize("name", layers.COMPUTED)
def test_any_number_of_tokens(name, m, dtype):
    kind = layers.DTYPES[dtype]
    (part, bias), x = layer(name, dtype=kind), tokens(name, m, dtype=kind)
    got = forward(x, part, bias)
    assert got.dtype == kind and got.shape == (m, 200)
    assert_close(got, linear.forward(x.float(), [part], bias, (), exact(x)), f"{dtype}_output")


def exact(x):
    """The reference with the codes of x in its own dtype, and an fp32 output."""

    class Exact:
        def __getattr__(self, op):
            right = getattr(reference, op)
            if op.startswith("quantize"):
                return lambda rows, *rest: right(rows.to(x.dtype), *rest)
            if op == "gemv_awq":
                return lambda rows, weights, **to: right(rows.to(x.dtype), weights, **to)
            return right

    return Exact()


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_opcheck(name):
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    here = ops.device("cuda")
    living = [row for row in select.to_try(here) if row.library and row.name not in here.distrusted]
    for op, arguments in test_ops.calls(name):
        spelling = next(row.name for row in living if op.__name__ in row.ops)
        there = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments[:-1]]
        if op.__name__ == "gemm_int4" and spelling in select.E4M3:
            there[:2] = carrier.carried(*there[:2])
        torch.library.opcheck(op, (*there, spelling), test_utils=checks)


@pytest.mark.parametrize("m", [40, 200], ids=["few", "with-scratch-memory-on-hopper"])
@pytest.mark.parametrize("name", layers.COMPUTED)
def test_inside_a_cuda_graph(name, m):
    """Nothing waits, nothing is allocated but results and scratch memory: a capture would refuse the former."""
    part, bias = layer(name)
    x, other = tokens(name, m).cuda(), tokens(name, m, seed=8).cuda()
    call = (on_gpu(part),), on_gpu(bias), (), ops
    want = linear.forward(other, *call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear.forward(x, *call)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, want)


@pytest.mark.parametrize("name", [name for name in layers.COMPUTED if name != "awq"])
def test_a_graph_neither_finds_nor_leaves_a_shared_input(name):
    """Replayed, it must read what is in x then; and what a capture computes is not there until it is replayed."""
    shared, slot = Input("qkv", 3), Slot()
    parts = [dataclasses.replace(on_gpu(layer(name)[0]), reader=Reader(shared, i)) for i in range(3)]
    x, other = tokens(name, 40).cuda(), tokens(name, 40, seed=8).cuda()
    want, later = ([linear.forward(t, [p], None, (), ops) for p in parts] for t in (x, other))
    first = linear.forward(x, parts[:1], None, (), ops, slot)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [linear.forward(x, [part], None, (), ops, slot) for part in parts]
    rest = [linear.forward(x, [part], None, (), ops, slot) for part in parts[1:]]
    x.copy_(other)
    graph.replay()
    for got, expected in zip((first, *rest, *captured), (*want, *later), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_on_another_stream(name):
    """Work is queued where torch's current stream says, behind what waits there."""
    part, bias = layer(name)
    x, side = tokens(name, 40).cuda(), torch.cuda.Stream()
    want = forward(x, part, bias)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = forward(late, part, bias)
    side.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("name", [name for name in layers.COMPUTED if name != "awq"])
def test_a_product_is_the_first_that_a_thread_does_on_a_gpu(name):
    """It has no context of the driver's then, which the maps of Hopper's copy engine are made in."""
    w, x = on_gpu(layers.random_linear(name, 200, 256, 32)), tokens(name, 200).cuda()
    here, op = ops.device("cuda"), f"gemm_{w.spec.format}"
    for row in select.to_try(here):
        if op not in row.ops or row.name in here.distrusted:
            continue
        op_set = ops.OpSet(row.name)
        product = partial(getattr(op_set, op), *test_spellings.quantize(op_set, x, w), w)
        want, out = product(), torch.empty(200, 200, device="cuda")
        with ThreadPoolExecutor(1) as fresh:
            fresh.submit(product, out=out).result()
        assert torch.equal(out, want)


@pytest.mark.parametrize("name", layers.COMPUTED)
def test_compiles_without_a_break(name):
    (part, bias), branch = layer(name), on_gpu(lora())
    here, bias_here = on_gpu(part), on_gpu(bias)

    def run(x):
        return linear.forward(x * 2, (here,), bias_here, (branch,), ops)  # exact, however it is fused

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (5, 40, 200):  # on Hopper other kernels for many
            x = tokens(name, m).cuda()
            assert_close(compiled(x), run(x), "bf16_output")


# ---- a GELU between two layers, by every kernel for it that the card has ----


PAIRS = {  # op -> the formats of its two layers
    "gemm_int4_gelu": ("int4", "int4-unsigned"),
    "gemm_nvfp4_gelu": ("nvfp4", "nvfp4"),
}
each_pair = pytest.mark.parametrize("op", PAIRS)


def fused_rows(op):
    here = ops.device("cuda")
    rows = [row for row in select.SPELLINGS if op in row.ops and not row.needs(here)]
    return [row for row in rows if row.name not in here.distrusted]


def a_pair(op, n, k, ranks, dtype=torch.bfloat16):
    """Two layers of which one reads what a GELU makes of the other's output."""
    sizes = (n, k, ranks[0]), (64, n, ranks[1])
    pair = zip(PAIRS[op], sizes, strict=True)
    return [on_gpu(layers.random_linear(name, *size, dtype=dtype)) for name, size in pair]


def steps(codes, op):
    """Codes as integers of which neighbours differ by one."""
    values = codes.int()
    return torch.where(values > 7, -(values & 7), values) if "nvfp4" in op else values


@each_pair
def test_a_fused_kernel_is_chosen_where_its_product_is(op):
    product = ops.choose(select.Request(op.removesuffix("_gelu"), "float16"), "cuda").spelling
    fused = ops.choose(select.Request(op, "float16"), "cuda").spelling
    assert fused == next((row.name for row in fused_rows(op) if row.beside == product), select.APART)


@each_pair
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("m", "n"),
    [(0, 256), (1, 256), (17, 256), (129, 256), (130, 2112), (4100, 12288)],
    ids=["empty", "m=1", "m=17", "m=129", "large-tile", "flux-with-walks"],
)
def test_together_and_apart(m, n, dtype, op):
    """The very codes, but for activations at which two compilers' tanh part and bf16 rounds apart: next to none."""
    kind, k = layers.DTYPES[dtype], 256
    first, then = a_pair(op, n, k, (32, 24), kind)
    x = layers.random(m, k, seed=7, dtype=kind).cuda()
    rows = [row for row in fused_rows(op) if str(kind).removeprefix("torch.") in row.dtypes]
    for row in rows:
        beside = ops.OpSet(row.beside)
        made = linear.quantize(x, first, beside)
        got = getattr(ops.OpSet(row.name), op)(*made, first, then, dtype=kind)
        between = torch.nn.functional.gelu(
            linear.multiply(made, first, beside, dtype=kind), approximate="tanh"
        )
        want = linear.quantize(between, then, beside)
        assert [t.dtype for t in got] == [t.dtype for t in want]
        wrong = (steps(got[0], op) - steps(want[0], op)).abs()
        assert not m or (wrong.max() <= 1 and wrong.float().mean() < 1e-4)
        if "nvfp4" in op:  # a scale of 8 bits is the same or its neighbour
            wrong = (got[1].view(torch.uint8).int() - want[1].view(torch.uint8).int()).abs()
            assert not m or (wrong.max() <= 1 and wrong.float().mean() < 1e-4)
        else:
            assert_close(got[1], want[1], f"{dtype}_output")
        assert_close(got[2], want[2], f"{dtype}_output")


@each_pair
def test_fused_kernels_pass_opcheck_and_repeat_themselves(op):
    checks, call = (
        ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        getattr(torch.ops.svdquant, op),
    )
    for row in fused_rows(op):
        kind = getattr(torch, row.dtypes[0])
        first, then = a_pair(op, 256, 128, (16, 16), kind)
        made = linear.quantize(layers.random(40, 128, seed=7, dtype=kind).cuda(), first, ops)
        floats = first.second_scale is not None
        layer = first.codes, first.scales, *([first.second_scale] if floats else []), first.up, first.bias
        shift = () if floats else (then.spec.act_shift,)
        arguments = *made, *layer, then.smooth, then.down, *shift, kind, row.name
        torch.library.opcheck(call, arguments, test_utils=checks)
        assert all(torch.equal(a, b) for a, b in zip(call(*arguments), call(*arguments), strict=True))


@each_pair
def test_a_fused_layer_inside_a_cuda_graph(op):
    first, then = a_pair(op, 2112, 128, (16, 16))
    x, other = (layers.random(130, 128, seed=s, dtype=torch.bfloat16).cuda() for s in (7, 8))
    for row in fused_rows(op):
        if "bfloat16" not in row.dtypes:
            continue
        op_set = Fused(row)
        want = linear.feed_forward(other, first, then, op_set)
        now = x.clone()
        linear.feed_forward(now, first, then, op_set)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear.feed_forward(now, first, then, op_set)
        now.copy_(other)
        graph.replay()
        assert torch.equal(y, want)


class Fused:
    """The op set that insists on one fused kernel and on the spelling it stands beside."""

    def __init__(self, row):
        self.fused, self.rest = ops.OpSet(row.name), ops.OpSet(row.beside)

    def __getattr__(self, op):
        return getattr(self.fused if op in select.FUSED_OPS else self.rest, op)


LORAS = {
    "whole-layer": {},
    "some-rows": dict(rows=slice(40, 120)),
    "some-columns": dict(columns=slice(64, 192)),
    "fp32-pair": dict(dtype=torch.float32),
}


@pytest.mark.parametrize("kind", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("name", layers.COMPUTED)
def test_a_lora_joins(name, kind):
    (part, bias), x, branch = layer(name), tokens(name, 33), lora(**kind)
    want = linear.forward(x.float(), [part], bias, [branch], exact(x))
    assert_close(forward(x, part, bias, [branch]), want, "two_bf16_factors")  # `down` is rounded, then y


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_parts_below_and_beside_each_other(name):
    first, second = layer(name)[0], dataclasses.replace(layer(name, seed=5)[0])
    for places in (dict(row=200), dict(column=256)):
        parts = [first, dataclasses.replace(second, **places)]
        x, bias = tokens(name, 19, 512 if "column" in places else 256), layers.random(400, seed=3)
        bias = bias[: max(p.rows.stop for p in parts)]
        got = linear.forward(x.cuda(), [on_gpu(p) for p in parts], bias.cuda(), (), ops)
        assert_close(got, linear.forward(x.float(), parts, bias, (), exact(x)), "bf16_output")


def test_tensors_of_two_devices_are_refused_in_words():
    w, x = on_gpu(layers.random_linear("int4", 32, 64, 4)), layers.random(3, 64, seed=1).cuda()
    with pytest.raises(ValueError, match="smooth: expected on cuda:0 as the rest, got cpu"):
        torch.ops.svdquant.quantize_int4(x, w.smooth.cpu(), w.down, "mma_s8")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_gpu():
    part, bias = layer("int4")
    x = tokens("int4", 40)
    there = torch.device("cuda", 1)
    moved = Part(
        dataclasses.replace(part.weights, **{n: t.to(there) for n, t in part.weights.tensors().items()})
    )
    y = linear.forward(x.to(there), [moved], bias.to(there), (), ops)
    assert y.device == there
    assert_close(y, linear.forward(x.float(), [part], bias, (), exact(x)), "bf16_output")
