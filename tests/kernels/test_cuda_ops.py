"""The ops of a GPU without a C++ compiler, through a driver that runs the kernels on an emulated card.

What they launch is compared with the C++ in test_launches.py; here it is what comes out, and what they refuse.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.kernels import cuda_ops, launches, ops, select, selftest
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels import launch_cases, test_cuda_gelu, test_hopper_int8, test_ops
from svdquant_nodes.tests.kernels.emulated import COMPILER, Kernels
from svdquant_nodes.tests.kernels.emulated_hopper import Hopper
from svdquant_nodes.tests.kernels.fake_driver import STREAM, Functions, card
from svdquant_nodes.tests.tolerances import assert_close

emulated = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")
SPELLINGS = {"mma_sm75": 75, "mma_s8": 120, "mxf4_sm120": 120, "mma_f16": 75, "gemv": 120}
SPELLINGS |= dict.fromkeys(("wgmma_e4m3", "wgmma_e4m3_x4", "wgmma_s8", "wgmma_s8_x2"), 90)
FUSED = {"gelu_sm75": ("int4", 75, torch.float16), "gelu_s4": ("int4", 80, torch.bfloat16)}
FUSED |= {"gelu_s8": ("int8", 120, torch.bfloat16), "gelu_f16": ("nvfp4", 80, torch.bfloat16)}
FUSED |= {"gelu_mxf4": ("mxf4", 120, torch.float16)}


def op_set(arch, spelling, functions=None):
    """core.reference's signatures over the ops in Python, on one emulated card."""
    here = card(arch, functions or Functions(arch))
    space = cuda_ops.CudaOps(lambda index: here)

    class Named(ops.OpSet):
        def _choose(self, *_: object) -> str:
            return spelling

    return SimpleNamespace(**{name: _over(space, getattr(Named(), name)) for name in select.OPS})


def _over(space, method):
    """An op of ops.OpSet with `space` in the place of torch.ops.svdquant."""

    def call(*arguments, **named):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops, "svdquant", space)
            return method(*arguments, **named)

    return call


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "row", [row for row in select.SPELLINGS if row.name in SPELLINGS], ids=lambda row: row.name
)
def test_layer(row, dtype):
    for name in layers.COMPUTED:
        weights = layers.random_linear(name, 72, 192, 24, dtype=dtype)
        kind = weights.spec.format
        if not any(op.endswith(kind) for op in row.ops):
            continue
        x = layers.random(19, 192, seed=8, dtype=dtype)
        x = torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype) if "unsigned" in name else x
        got = linear.linear(x, weights, op_set(SPELLINGS[row.name], row.name))
        assert_close(got, linear.linear(x, weights, reference), "split_branch")


@emulated
@pytest.mark.parametrize("shape", ["m=17-tail", "m=66-two-rows-of-tiles", "m=0-empty"])
@pytest.mark.parametrize(("spelling", "at"), FUSED.items(), ids=FUSED)
def test_two_layers_around_a_gelu(spelling, at, shape):
    """The same bits as through the C++ launches."""
    product, arch, dtype = at
    given = test_cuda_gelu.pair(*test_cuda_gelu.SHAPES[shape], dtype, test_cuda_gelu.usual(product))
    want = Kernels(arch).gemm_gelu(product, *given, dtype=dtype)
    op = linear.fused_op(given[-2].spec, given[-1].spec)
    got = getattr(op_set(arch, spelling), op)(*given, dtype=dtype)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert all(map(torch.equal, got, want))


@emulated
@pytest.mark.parametrize("spelling", ["wgmma_s8", "wgmma_s8_x2"])
def test_eight_bits_on_hopper(spelling):
    """The same bits as through the C++ launches, on four processors."""
    given = test_hopper_int8.inputs(260, 200, 144, 16)
    want = Hopper(clusters=spelling.endswith("x2")).gemm_int8(*given, dtype=torch.bfloat16)
    functions = Functions(90)
    got = op_set(90, spelling, functions).gemm_int8(*given, dtype=torch.bfloat16)
    assert torch.equal(got, want)
    assert ("Cluster<2, 1>" in functions.launched[0][0]) == spelling.endswith("x2")


@emulated
@pytest.mark.parametrize("spelling", ["wgmma_e4m3", "wgmma_e4m3_x4"])
@pytest.mark.parametrize("name", ["int4", "int4-unsigned"])
def test_four_bits_on_hopper(name, spelling):
    """Through the copy engine's maps of what the quantizer wrote and of what was made in scratch memory."""
    functions, weights = Functions(90), layers.random_linear(name, 136, 192, 24)
    here, x = op_set(90, spelling, functions), layers.random(130, 192, seed=8, dtype=torch.bfloat16)
    made, want = linear.quantize(x, weights, here), linear.quantize(x, weights, reference)
    assert made[0].dtype == torch.float8_e4m3fn and made[1].stride() == (1, 132)
    assert torch.equal(made[0].float(), want[0].float()) and torch.equal(made[1], want[1].float())
    in_clusters = spelling.endswith("x4")
    y = here.gemm_int4(*made, weights)
    assert torch.equal(y, Hopper(clusters=in_clusters).gemm_int4(*made, weights))
    assert torch.equal(y, here.gemm_int4(*want[:2], made[2], weights))  # codes of another's are carried first
    assert_close(y, reference.gemm_int4(*want, weights), "split_branch")
    tile = f"W4A4Tile<Cluster<{2 if in_clusters else 1}, {2 if in_clusters else 1}>>"
    launched = [entry[0] for entry in functions.launched]
    product = ["expand_kernel<64>", f"w4a4_kernel<{tile}>"]
    assert launched == ["quantize_e4m3_kernel<DType::kBF16, 32>", *product, *product]


MIXED = {  # who quantizes, who multiplies -> what is said
    "bytes-to-hopper": ("mma_s8", "wgmma_e4m3", "codes: expected float8_e4m3fn for this spelling, got int8"),
    "e4m3-to-others": (
        "wgmma_e4m3",
        "mma_s8",
        "codes: expected int8 or uint8 for this spelling, got float8_e4m3fn",
    ),
}


@pytest.mark.parametrize(("first", "second", "message"), MIXED.values(), ids=MIXED)
def test_a_product_refuses_what_another_spelling_wrote(first, second, message):
    space, w = cuda_ops.CudaOps(lambda _: card(90, Functions())), layers.random_linear("int4", 32, 64, 4)
    made = space.quantize_int4(layers.random(3, 64, seed=1), w.smooth, w.down, first)
    with pytest.raises(ValueError, match=message):
        space.gemm_int4(*made, w.codes, w.scales, w.up, w.bias, None, torch.empty(3, 32), second)


@pytest.mark.parametrize("tokens", [128, 129])
@pytest.mark.parametrize("name", ["int4", "int4-unsigned"])
def test_what_hopper_quantizes_is_what_its_product_reads(monkeypatch, name, tokens):
    """As select.py chooses, on either side of the number of tokens where it changes its mind."""
    functions, hopper = Functions(), select.Device("cuda", capability=(9, 0))
    monkeypatch.setattr(ops, "choose", lambda request, *_: select.choose(hopper, request))
    monkeypatch.setattr(ops, "_known", ops._known.__wrapped__)  # nothing of this card is to be remembered
    monkeypatch.setattr(torch.ops, "svdquant", cuda_ops.CudaOps(lambda _: card(90, functions)))
    w, x = layers.random_linear(name, 136, 64, 8), layers.random(tokens, 64, seed=8, dtype=torch.bfloat16)
    linear.linear(x, w, ops.OpSet("auto"))
    few = ["quantize_kernel<DType::kBF16, false, 32>", "gemm_int4_kernel<SmallTile, Int8Product>"]
    square = "w4a4_kernel<W4A4Tile<Cluster<2, 2>>>"
    many = ["quantize_e4m3_kernel<DType::kBF16, 32>", "expand_kernel<64>", square]
    assert [entry[0] for entry in functions.launched] == (few if tokens == 128 else many)


@pytest.fixture
def on_cpu():
    """Hopper's ops in Python behind torch.ops, for tensors of the CPU."""
    space = cuda_ops.CudaOps(lambda _: card(90, Functions(90)))
    ops.declare()
    with torch.library._scoped_library("svdquant", "IMPL") as library:
        for name in select.INT4_OPS:
            library.impl(name, getattr(space, name), "CPU")
        yield torch.ops.svdquant


@emulated
@pytest.mark.parametrize("m", [0, 1, 7, 130])
def test_the_fake_kernels_know_what_hopper_quantizes(on_cpu, m):
    """Types and strides."""
    w, x = layers.random_linear("int4", 40, 128, 8), layers.random(m, 128, seed=3, dtype=torch.bfloat16)
    for op, shift in ((on_cpu.quantize_int4, ()), (on_cpu.quantize_int4_unsigned, (0.5,))):
        arguments = (x, w.smooth, w.down, *shift, "wgmma_e4m3")
        torch.library.opcheck(op, arguments, test_utils=["test_faketensor", "test_aot_dispatch_dynamic"])


@emulated
def test_hopper_compiles_without_a_break(on_cpu):
    class Named(ops.OpSet):
        def _choose(self, *_: object) -> str:
            return "wgmma_e4m3"

    w, x = layers.random_linear("int4", 40, 128, 8), layers.random(6, 128, seed=3, dtype=torch.bfloat16)

    def layer(x):
        return linear.linear(torch.nn.functional.silu(x), w, Named())

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (6, 3):
            assert torch.equal(compiled(x[:tokens]), layer(x[:tokens]))


@emulated
def test_the_self_test_takes_it_for_a_card(monkeypatch):
    """The small ones of its layers: every convention between the ops and the kernels in one."""
    monkeypatch.setattr(selftest, "CASES", [case for case in selftest.CASES if case.n < 100])
    functions = Functions(120)
    assert selftest.problem(op_set(120, "mma_s8", functions), torch.device("cpu"), select.INT4_OPS) is None
    assert {entry[-1] for entry in functions.launched} == {STREAM} and len(functions.launched) > 4


@pytest.mark.parametrize(
    ("name", "which", "index", "value", "message"), test_ops.BAD.values(), ids=test_ops.BAD
)
def test_bad_arguments_are_named(name, which, index, value, message):
    """In the words of csrc/ops.cpp, but for the names of dtypes."""
    functions = Functions()
    space = cuda_ops.CudaOps(lambda _: card(80, functions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "svdquant", space)
        op, arguments = list(test_ops.calls(name))[which]
        with pytest.raises(ValueError, match=message):
            op(*test_ops.change(arguments, index, value))


BAD_PAIRS = {  # argument, value, message
    "codes-unsigned": (0, torch.zeros(5, 64).byte(), "codes: expected int8, got uint8"),
    "rows-not-in-groups": (
        3,
        torch.zeros(96, 32).byte(),
        "weight_codes: expected rows in groups of 64, got 96",
    ),
    "smooth-of-other-n": (7, torch.ones(64), r"next_smooth: expected shape \[128\], got \[64\]"),
    "down-of-other-n": (8, torch.ones(8, 64), r"next_down: expected shape \[8, 128\], got \[8, 64\]"),
    "of-integers": (10, torch.int8, "dtype: expected a float of 32, 16 or 8 bits, got int8"),
}


@pytest.mark.parametrize(("index", "value", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_arguments_of_two_layers_are_named(index, value, message):
    _, given = launch_cases.gelu((5, 128, 64, 8), torch.float16, "gelu_s4")
    given = [*given[:index], value, *given[index + 1 :]]
    if index == 3:  # whose other tensors have as many rows
        given[4:7] = torch.zeros(96, 1), torch.zeros(96, 16), None
    with pytest.raises(ValueError, match=message):
        cuda_ops.CudaOps(lambda _: card(80, Functions())).gemm_int4_gelu(*given)


@pytest.mark.parametrize(
    ("spelling", "scales"), [("gelu_s4", torch.float16), ("gelu_f16", torch.float8_e4m3fn)], ids=str
)
def test_two_layers_through_torch(spelling, scales):
    """torch hands over the dtype as it was given."""
    op, given = launch_cases.gelu((5, 128, 64, 8), torch.float16, spelling)
    functions = Functions()
    space = cuda_ops.CudaOps(lambda _: card(80, functions))
    ops.declare()
    with torch.library._scoped_library("svdquant", "IMPL") as library:
        library.impl(op, getattr(space, op), "CPU")
        made = getattr(torch.ops.svdquant, op)(*given)
    assert [t.dtype for t in made] == [torch.uint8, scales, torch.float32]
    assert len(functions.launched) == 2


def test_every_op_has_the_arguments_of_its_schema():
    for schema in ops.SCHEMAS:
        name, _, rest = schema.partition("(")
        count = rest.rpartition(") -> ")[0].count(",") + 1
        parameters = inspect.signature(getattr(cuda_ops.CudaOps, name)).parameters.values()
        many = any(p.kind == p.VAR_POSITIONAL for p in parameters)
        assert many or len(parameters) - 1 == count
    assert {schema.partition("(")[0] for schema in ops.SCHEMAS} == set(cuda_ops.OPS)


REFUSED = {
    "another-kinds-spelling": ("mma_f16", 0, "spelling 'mma_f16': it has no product for int4 activations"),
    "unaligned-codes": ("mma_s4", 8, "spelling 'mma_s4': codes must begin at a multiple of 16 bytes"),
}


@pytest.mark.parametrize(("spelling", "offset", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_kernel_cannot_do_is_said(spelling, offset, message):
    space = cuda_ops.CudaOps(lambda _: card(80, Functions()))
    m, n, k, r = 5, 40, 128, 8
    codes = torch.zeros(m * k + offset, dtype=torch.int8)[offset:].view(m, k)
    branch = (
        torch.zeros(m, r),
        torch.zeros(n, k // 2, dtype=torch.uint8),
        torch.zeros(n, 2),
        torch.zeros(n, r),
    )
    with pytest.raises(RuntimeError, match=message):
        space.gemm_int4(codes, torch.zeros(m, 2), *branch, None, None, torch.empty(m, n), spelling)


def test_an_error_of_the_driver_is_said():
    functions = Functions(fails={"cuLaunchKernel": 1})
    space = cuda_ops.CudaOps(lambda _: card(80, functions))
    w = layers.random_linear("int4", 32, 64, 4)
    with pytest.raises(RuntimeError, match="spelling 'mma_s4': cuLaunchKernel: invalid argument"):
        space.quantize_int4(layers.random(3, 64, seed=1), w.smooth, w.down, "mma_s4")


@pytest.mark.parametrize("m", [0, 3])
def test_nothing_is_launched_for_no_tokens(m):
    functions = Functions()
    space = cuda_ops.CudaOps(lambda _: card(80, functions))
    w = layers.random_linear("int4", 32, 64, 4)
    made = space.quantize_int4(layers.random(m, 64, seed=1), w.smooth, w.down, "mma_s4")
    space.gemm_int4(*made, w.codes, w.scales, w.up, w.bias, None, torch.empty(m, 32), "mma_s4")
    assert len(functions.launched) == (2 if m else 0)


@pytest.mark.parametrize("arch", [75, 80, 90, 120], ids="sm{}".format)
def test_spellings_of_a_card_are_the_rows_of_the_table(arch):
    space = cuda_ops.CudaOps(lambda _: card(arch, Functions()))
    listed = space.spellings(torch.empty(0)).split()
    here = select.Device("cuda", capability=divmod(arch, 10))
    rows = [row.name for row in select.SPELLINGS if row.device == "cuda" and not row.needs(here)]
    assert listed == rows
    hopper = {spelling for products in launches.HOPPER.values() for spelling in products}
    fused = {spelling for products in launches.FUSED.values() for spelling in products}
    assert set(listed) - {"gemv"} <= launches.PRODUCTS.keys() | fused | hopper
