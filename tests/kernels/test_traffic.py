"""Memory as the kernels use it, counted on the emulated card: no bank conflicts, and whole sectors.

Shapes are whole tiles, as nearly all of a layer is; what a layer's edge costs is not said here. An access that takes
more than the least stands in a table with the reason why, and the table holds nothing else.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.kernels.emulated import COMPILER, ready
from svdquant_nodes.tests.kernels.traffic import Counted, excess, report

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

LARGE, SMALL = (
    (128, 4096, 384, 32),
    (64, 128, 384, 32),
)  # M, N, K, R: 64 tiles of 128 x 64, and two of 64 x 64


def product_inputs(kind, m, n, k, r):
    weights = layers.random_linear(kind, n, k, r, seed=3)
    signed = kind == "int4"
    codes = torch.randint(-8 if signed else 0, 8 if signed else 16, (m, k)).to(
        torch.int8 if signed else torch.uint8
    )
    scales = (torch.rand(m, k // weights.spec.group) + 0.1).to(
        torch.bfloat16 if "int4" in kind else torch.float8_e4m3fn
    )
    return codes, scales, layers.random(m, r, seed=6), weights


def run_gemm(kernels, product, kind, shape, dtype=torch.bfloat16):
    kernels.gemm(product, kind, *product_inputs(kind, *shape), dtype=dtype)


def run_gemm_int8(kernels, shape):
    m, n, k, r = shape
    codes = torch.randint(-127, 128, (m, k)).to(torch.int8)
    weights = layers.random_linear("int8-of-int4", n, k, r, seed=3)
    kernels.gemm_int8(codes, torch.rand(m, 1), layers.random(m, r, seed=6), weights, dtype=torch.bfloat16)


def run_gelu(kernels, product, shape):
    m, n, k, r = shape
    kinds = ("nvfp4", "nvfp4") if product in ("nvfp4", "mxf4") else ("int4", "int4-unsigned")
    first, then = (
        layers.random_linear(kind, *of, seed=3)
        for kind, of in zip(kinds, ((n, k, r), (64, n, r)), strict=True)
    )
    x = linear.quantize(layers.random(m, k, seed=1, dtype=torch.bfloat16), first, reference)
    kernels.gemm_gelu(product, *x, first, then, walk=None)


def run_quantize(kernels, kind, r=32, dtype=torch.bfloat16, carried=False):
    w = layers.random_linear("nvfp4" if kind == "nvfp4" else "int4", 64, 1024, r, dtype=dtype, seed=3)
    x = layers.random(32, 1024, seed=1, dtype=dtype)
    kernels.quantize(kind, x, w.smooth, w.down, carried=carried)


def run_gemv(kernels, m):
    weights = layers.random_linear("awq", 64, 2048, seed=3)
    kernels.gemv(layers.random(m, 2048, seed=1, dtype=torch.bfloat16), weights, dtype=torch.bfloat16)


CASES = {
    "gemm_int4-large": (80, lambda k: run_gemm(k, "int4", "int4", LARGE)),
    "gemm_int4-small": (80, lambda k: run_gemm(k, "int4", "int4", SMALL)),
    "gemm_int4-8bit": (80, lambda k: run_gemm(k, "int8", "int4", SMALL)),
    "gemm_int4-fp32": (80, lambda k: run_gemm(k, "int8", "int4", SMALL, torch.float32)),
    "gemm_w8a8-large": (80, lambda k: run_gemm_int8(k, (1024, 1024, 128, 32))),
    "gemm_w8a8-small": (80, lambda k: run_gemm_int8(k, SMALL)),
    "gemm_nvfp4": (80, lambda k: run_gemm(k, "nvfp4", "nvfp4", SMALL)),
    "gemm_mxf4": (120, lambda k: run_gemm(k, "mxf4", "nvfp4", SMALL)),
    "gelu-large": (80, lambda k: run_gelu(k, "int4", LARGE)),
    "gelu-small": (80, lambda k: run_gelu(k, "int4", SMALL)),
    "gelu-nvfp4": (80, lambda k: run_gelu(k, "nvfp4", SMALL)),
    "gelu-mxf4": (120, lambda k: run_gelu(k, "mxf4", LARGE)),
    "quantize_int4": (80, lambda k: run_quantize(k, "int4")),
    "quantize_int4-r128": (80, lambda k: run_quantize(k, "int4", 128)),
    "quantize_int8": (80, lambda k: run_quantize(k, "int8")),
    "quantize_nvfp4": (80, lambda k: run_quantize(k, "nvfp4")),
    "quantize_e4m3": (90, lambda k: run_quantize(k, "int4", carried=True)),
    "quantize-fp32": (80, lambda k: run_quantize(k, "int4", dtype=torch.float32)),
    "gemv-one": (80, lambda k: run_gemv(k, 1)),
    "gemv-eight": (80, lambda k: run_gemv(k, 8)),
}


TWICE = "a lane's 32 bytes are two requests, the second of which finds its sectors in the first-level cache"
ONE_BY_ONE = "once a tile, behind its loop: ranks are read one by one"
EXCEPTIONS = {  # access -> times the least, and why that is right
    "fetch: load scales": (4.0, "four groups at a time of a row's 16, which the cache keeps for the next"),
    "fetch: load weight scales": (4.0, "likewise"),
    "copy_words: load scales": (8.0, "a step's four scales of a row's 32 bytes, which the cache keeps for the next"),
    "copy_words: load weight scales": (8.0, "likewise"),
    "load_one: load hidden": (2.0, ONE_BY_ONE),
    "load_one: load up": (2.0, ONE_BY_ONE),
    "load_words: load x": (2.0, TWICE),
    "load_words: load smooth": (2.0, TWICE),
    "load_words: load down": (2.0, TWICE),
    "store_one: store scales": (8.0, "a scale of each token of a chunk: 2 bytes to 64 of its codes"),
    "store_one: store next scales": (8.0, "likewise"),
    "encode_e2m1: store scales": (8.0, "four scales of each token of a chunk: 4 bytes to 64 of its codes"),
    "encode_e2m1: store next scales": (8.0, "likewise"),
    "operator(): store scratch": (2.0, "hidden values in a product's order, which the second-level cache keeps"),
}  # fmt: skip


def traffic(case):
    arch, run = CASES[case]
    kernels = Counted(arch)
    run(kernels)
    return kernels.lines


@pytest.mark.parametrize("case", CASES)
def test_no_more_than_the_least(case):
    lines = traffic(case)
    assert not {line.name for line in lines if line.uneven}
    more = {
        name: times for name, times in excess(lines).items() if times > EXCEPTIONS.get(name, (1.0, ""))[0]
    }
    assert not more


def test_exceptions_are_needed():
    cases = (
        "gemm_int4-small",
        "gemm_nvfp4",
        "gelu-large",
        "gelu-small",
        "gelu-nvfp4",
        "quantize_int4",
        "quantize_nvfp4",
    )
    found = {name for case in cases for name in excess(traffic(case))}
    assert not EXCEPTIONS.keys() - found


ACCESSES = {
    "gemm_int4-small": {
        ("copy", "shared"),
        ("load", "shared"),
        ("load", "codes"),
        ("load", "weights"),
        ("store", "out"),
    },
    "quantize_int4": {
        ("load", "x"),
        ("load", "down"),
        ("store", "codes"),
        ("store", "scales"),
        ("store", "hidden"),
    },
    "gemv-one": {("store", "shared"), ("load", "shared"), ("load", "weights"), ("store", "out")},
}


@pytest.mark.parametrize(("case", "accesses"), ACCESSES.items(), ids=ACCESSES)
def test_accesses_are_seen(case, accesses):
    assert accesses <= {(line.kind, line.where) for line in traffic(case)}


# ---- the counting itself: a warp's requests of which the answer is known ----

PATTERNS = {  # of one warp: bytes a lane, words from lane to lane -> wavefronts, of shared memory
    "words-side-by-side": (4, 1, 1),
    "words-of-one": (4, 0, 1),
    "every-second-word": (4, 2, 2),
    "a-column-of-32": (4, 32, 32),
    "a-column-of-33": (4, 33, 1),
    "eights-side-by-side": (8, 2, 2),
    "eights-a-line-apart": (8, 32, 32),
    "sixteens-side-by-side": (16, 4, 4),
    "every-second-sixteen": (16, 8, 8),
    "rows-without-padding": (16, 32, 32),
    "rows-with-padding": (16, 36, 4),
}


@pytest.mark.parametrize(("size", "stride", "wavefronts"), PATTERNS.values(), ids=PATTERNS)
def test_wavefronts(size, stride, wavefronts):
    assert counted("read_apart", size, stride) == {"shared": wavefronts}


SECTORS = {  # bytes a lane, words from lane to lane -> sectors
    "words-side-by-side": (4, 1, 4),
    "every-second-word": (4, 2, 8),
    "sixteens-side-by-side": (16, 4, 16),
    "every-second-sixteen": (16, 8, 32),
    "a-word-of-each-row": (4, 16, 32),
}


@pytest.mark.parametrize(("size", "stride", "sectors"), SECTORS.values(), ids=SECTORS)
def test_sectors(size, stride, sectors):
    assert counted("load_apart", size, stride) == {"memory": sectors}


def counted(function, size, stride):
    """What one request of a warp moves: lane i touches `size` bytes from word i * stride on."""
    kernels, memory = ready(80), torch.zeros(32 * 40, dtype=torch.int32)
    base = memory.data_ptr() // 32 * 32 + 32 - memory.data_ptr()  # a sector's beginning
    begin = memory[base // 4 :]
    kernels.allow(ctypes.c_void_p(begin.data_ptr()), ctypes.c_int64(begin.numel() * 4), False)
    kernels.count_traffic(True)
    getattr(kernels, function).restype = ctypes.c_char_p
    assert getattr(kernels, function)(ctypes.c_void_p(begin.data_ptr()), size, stride) is None
    lines = report(kernels, ["memory"])
    kernels.count_traffic(False)
    return {line.where: line.moved for line in lines if line.kind == "load"}
