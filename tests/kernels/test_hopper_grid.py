"""How the Hopper kernels divide a product: which tiles, in clusters or not, in which order."""

from __future__ import annotations

import ctypes

import pytest

from svdquant_nodes.tests.kernels import test_hopper_int4, test_hopper_int8
from svdquant_nodes.tests.kernels.emulated import COMPILER, library
from svdquant_nodes.tests.kernels.emulated_hopper import ARCH, Hopper
from svdquant_nodes.tests.kernels.fake_driver import Grid

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")


class Shape(ctypes.Structure):
    _fields_ = [("columns", ctypes.c_int), ("down", ctypes.c_int), ("across", ctypes.c_int)]


def sizes(*numbers):
    return map(ctypes.c_int64, numbers)


def chosen(kernel, m, n, clusters):
    shape = Shape()
    library(ARCH).choose_tile(kernel.encode(), clusters, *sizes(m, n, 132), ctypes.byref(shape))
    return shape.columns, shape.down, shape.across


def places(m, n, shape, count):
    row, column = ctypes.c_int(), ctypes.c_int()
    for tile in range(count):
        library(ARCH).tile_at(
            *sizes(m, n), ctypes.byref(shape), tile, ctypes.byref(row), ctypes.byref(column)
        )
        yield row.value, column.value


CHOICES = {  # kernel, M, N, whether in clusters -> columns, tiles of a cluster down and across
    "flux-fc1-alone": ("w8a8", 4608, 12288, False, (256, 1, 1)),
    "flux-fc1": ("w8a8", 4608, 12288, True, (256, 2, 1)),
    "flux-proj": ("w8a8", 4608, 3072, True, (256, 2, 1)),
    "flux-text": ("w8a8", 512, 3072, True, (128, 2, 1)),
    "sdxl": ("w8a8", 8192, 5120, True, (256, 2, 1)),
    "one-row-of-tiles-that-fills-the-card": ("w8a8", 77, 12288, True, (128, 1, 1)),
    "w4a4-alone": ("w4a4", 4608, 3072, False, (128, 1, 1)),
    "w4a4": ("w4a4", 4608, 3072, True, (128, 2, 2)),
    "w4a4-of-odd-columns": ("w4a4", 8192, 640, True, (128, 2, 2)),
    "w4a4-of-one-row-that-fills-the-card": ("w4a4", 77, 12288, True, (128, 1, 1)),
    "one-row-of-few-tiles": ("w8a8", 77, 3072, True, (96, 2, 1)),
}


@pytest.mark.parametrize(("kernel", "m", "n", "clusters", "want"), CHOICES.values(), ids=CHOICES)
def test_choice_of_tile(kernel, m, n, clusters, want):
    assert chosen(kernel, m, n, clusters) == want


LAUNCHES = {  # three rows of tiles of 96 columns, or of three tiles, on 132 SMs -> blocks, of which a cluster has
    "w8a8-alone": ("gemm_int8", test_hopper_int8.inputs(260, 90, 128, 16), False, (3, 1)),
    "w8a8-pairs": ("gemm_int8", test_hopper_int8.inputs(260, 90, 128, 16), True, (4, 2)),
    "w4a4-alone": ("gemm_int4", test_hopper_int4.inputs("signed", 260, 260, 128, 16), False, (9, 1)),
    "w4a4-fours": ("gemm_int4", test_hopper_int4.inputs("signed", 260, 260, 128, 16), True, (16, 4)),
}


@pytest.mark.parametrize(("op", "inputs", "clusters", "want"), LAUNCHES.values(), ids=LAUNCHES)
def test_launch(op, inputs, clusters, want):
    """Of the product, which is the last launch of a call."""
    kernels, grid = library(ARCH), Grid()
    kernels.record(True)
    try:
        getattr(Hopper(sms=132, clusters=clusters), op)(*inputs)
        kernels.recorded_grid(kernels.recorded() - 1, ctypes.byref(grid))
    finally:
        kernels.record(False)
    assert (grid.x, grid.cluster) == want


def test_reads_decide_where_products_take_as_long():
    """4 rounds of 288 columns' time each way; 432 tiles of 384 or of 256 rows of 128 bytes, from 28 bytes a clock."""
    clocks = library(ARCH).step_clocks
    clocks.restype = ctypes.c_int64
    alone, pair = (clocks(*sizes(4608, 3072, 132), ctypes.byref(Shape(256, down, 1))) for down in (1, 2))
    products, reads = 4 * 288 * 4, [432 * rows * 128 // (28 * 132) for rows in (384, 256)]
    assert (alone, pair) == (reads[0] + products // 4, products + reads[1] // 4)


GRIDS = {  # M, N, tile: columns, tiles of a cluster
    "one-tile": (100, 90, (96, 1, 1)),
    "flux-alone": (4608, 12288, (256, 1, 1)),
    "pairs-of-an-odd-number": (17 * 128, 3 * 128, (128, 2, 1)),
    "fours-of-odd-numbers": (5 * 128, 39 * 128, (128, 2, 2)),
}


@pytest.mark.parametrize(("m", "n", "shape"), GRIDS.values(), ids=GRIDS)
def test_every_tile_is_taken_once(m, n, shape):
    columns, down, across = shape
    rows, columns = -(-m // (128 * down)), -(-n // (columns * across))
    taken = sorted(places(m, n, Shape(*shape), rows * columns))
    assert taken == [(row, column) for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize("down", [1, 2], ids=["alone", "pairs"])
def test_tiles_of_a_wave_are_near_each_other(down):
    """132 tiles of a large output touch few rows and columns, whose operands the cache then holds."""
    wave = list(places(4608, 12288, Shape(256, down, 1), 264 // down))[132 // down :]
    assert len({row for row, _ in wave}) * down + len({column for _, column in wave}) <= 26


def test_bands_are_of_equal_height():
    """36 rows of tiles in bands of 12: of 16, 16 and 4 the last would read many columns for few rows."""
    rows = [row for row, _ in places(4608, 256, Shape(256, 1, 1), 36)]
    first = [row for row, column in places(4608, 512, Shape(256, 1, 1), 72) if column == 0]
    assert rows == list(range(36))
    assert first == rows
    assert [row for row, _ in places(4608, 512, Shape(256, 1, 1), 24)] == [*range(12), *range(12)]
