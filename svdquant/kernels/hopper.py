"""Hopper's own products, started from Python: what the host side of csrc/cuda/hopper_*.cu decides.

Which tile a block has, whether blocks share operands in clusters, the maps of the copy engine, and for W4A4 the scratch
memory in which its weights are made e4m3. Tests hold all of it against the C++, as launches.py says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .starts import Kernel, Matrix, Place, Refused, Scratch, Start, ceil_div, check_aligned
from .structs import Expand, Finish, Gemm, GemmInt8, TileGrid, W4A4Params, W8A8Params

TILE_ROWS, STEP = 128, 128  # rows of a tile; columns of a step
THREADS = 384
SHARED_LIMIT, SWIZZLE = 227 * 1024, 1024
GROUP, GROUPS_OF_STEP = 64, 2


# ---- which tile ----


@dataclass(frozen=True)
class Shape:
    """Columns of a tile, and the tiles of a cluster: `down` above each other, `across` side by side."""

    columns: int
    down: int = 1
    across: int = 1

    @property
    def blocks(self) -> int:
        return self.down * self.across

    @property
    def cluster(self) -> str:
        return f"Cluster<{self.down}, {self.across}>"


W8A8_ALONE = tuple(Shape(columns) for columns in (256, 192, 128, 96))
W8A8_PAIRS = tuple(Shape(columns, down=2) for columns in (256, 192, 128, 96))
W4A4_ALONE = (Shape(128),)
W4A4_SQUARES = (Shape(128, down=2, across=2),)
CACHE_BYTES = 28  # of the second-level cache, a clock and processor


def step_clocks(m: int, n: int, sms: int, shape: Shape) -> int:
    """What one step of all tiles takes: products or reads, whichever is longer, and a quarter of the other."""
    rows, columns = ceil_div(m, TILE_ROWS * shape.down), ceil_div(n, shape.columns * shape.across)
    at_once = max(sms // shape.blocks, 1)
    products = ceil_div(rows * columns, at_once) * (shape.columns + 32) * 4
    reads = (m * columns + n * rows) * STEP // (CACHE_BYTES * sms)
    return max(products, reads) + min(products, reads) // 4


def choose(m: int, n: int, sms: int, shapes: tuple[Shape, ...]) -> Shape:
    """The quickest; of equals the first."""
    return min(shapes, key=lambda shape: step_clocks(m, n, sms, shape))


def divide(m: int, n: int, shape: Shape, at_once: int) -> TileGrid:
    """Tiles of clusters in bands of about sixteen rows, and how many workers share them."""
    rows, columns = ceil_div(m, TILE_ROWS * shape.down), ceil_div(n, shape.columns * shape.across)
    bands = ceil_div(rows, 16 // shape.down)
    return TileGrid(rows, columns, min(rows * columns, at_once), ceil_div(rows, bands))


def _shared_bytes(columns: int, scale_bytes: int = 0) -> int:
    """As many stages as fit beside 32 ranks of `up`, scales, bias, rows on their way out, and barriers."""
    stage = (TILE_ROWS + columns) * STEP + 2 * scale_bytes
    fixed = columns * 32 * 2 + 2 * columns * 4 + 2 * 4 * 8 * 144 + 256
    return SWIZZLE + (SHARED_LIMIT - SWIZZLE - fixed) // stage * stage + fixed


def _finish(args: Gemm | GemmInt8, scales: int | None, weight_scales: int | None) -> Finish:
    after = args.hidden, args.up, args.bias, args.addend, args.out
    return Finish(args.m, args.n, args.r, scales, weight_scales, *after)


# ---- W8A8 ----


@cache
def _w8a8(shape: Shape) -> Kernel:
    name = f"w8a8_kernel<HopperTile<{shape.columns}, {shape.cluster}>>"
    return Kernel("hopper_w8a8", name, THREADS, _shared_bytes(shape.columns), shape.blocks)


def gemm_int8(place: Place, args: GemmInt8, _: Scratch, *, in_clusters: bool) -> Iterator[Start]:
    """A W8A8 product, by blocks that each read their own operands or by clusters that share them."""
    if args.k % 16:
        raise Refused("rows of codes must be a multiple of 16 bytes")
    check_aligned("codes", args.codes, 16)
    check_aligned("codes", args.weight_codes, 16)
    shapes = (*W8A8_PAIRS, *W8A8_ALONE) if in_clusters else W8A8_ALONE
    shape = choose(args.m, args.n, place.multiprocessors, shapes)
    kernel = _w8a8(shape)
    grid = divide(args.m, args.n, shape, place.clusters_at_once(kernel))
    maps = (
        place.encode(Matrix(args.codes, args.m, args.k, args.k, TILE_ROWS // shape.across, STEP)),
        place.encode(Matrix(args.weight_codes, args.n, args.k, args.k, shape.columns // shape.down, STEP)),
    )
    params = W8A8Params(*maps, grid, ceil_div(args.k, STEP), _finish(args, args.scales, args.weight_scales))
    yield Start(kernel, (grid.workers * shape.blocks, 1), params)


# ---- exact W4A4: activations are e4m3 already, and weights become it in scratch memory ----

EXPAND = Kernel("hopper_expand", "expand_kernel<64>", 256, 0)


@cache
def _w4a4(shape: Shape) -> Kernel:
    shared_bytes = _shared_bytes(shape.columns, 4 * GROUPS_OF_STEP * TILE_ROWS)
    return Kernel(
        "hopper_w4a4", f"w4a4_kernel<W4A4Tile<{shape.cluster}>>", THREADS, shared_bytes, shape.blocks
    )


def expand_weights(args: Gemm, scratch: Scratch, sms: int) -> Start:
    """The launch that makes them: codes, then scales as fp32 with a group's side by side, at multiples of 16 bytes."""
    scale_row, code_bytes = ceil_div(args.n, 4) * 4, args.n * args.k
    codes = scratch(code_bytes + 4 * scale_row * (args.k // GROUP))
    check_aligned("scratch memory", codes, 16)
    count = min(ceil_div(args.n * (args.k // 16), EXPAND.threads), 16 * sms)
    to = codes, codes + code_bytes, scale_row, count
    return Start(EXPAND, (count, 1), Expand(args.weight_codes, args.weight_scales, args.n, args.k, *to))


def _carried(
    codes: int, scales: int, rows: int, k: int, scale_row: int, blocks: int
) -> tuple[Matrix, Matrix]:
    """An operand for so many blocks, which share out the rows of a tile's codes, and the groups of its scales."""
    of_codes = rows, k, k, TILE_ROWS // blocks, STEP
    of_scales = k // GROUP, rows, 4 * scale_row, GROUPS_OF_STEP // blocks, TILE_ROWS, 4
    return Matrix(codes, *of_codes), Matrix(scales, *of_scales)


def gemm_int4(place: Place, args: Gemm, scratch: Scratch, *, in_clusters: bool) -> Iterator[Start]:
    """An exact W4A4 product of what quantize_e4m3 wrote: a launch that makes its weights, and its own."""
    check_aligned("codes", args.codes, 16)
    check_aligned("weight codes", args.weight_codes, 8)
    sms, k = place.multiprocessors, args.k
    expand = expand_weights(args, scratch, sms)
    yield expand
    shape = choose(args.m, args.n, sms, (*W4A4_SQUARES, *W4A4_ALONE) if in_clusters else W4A4_ALONE)
    acts = _carried(args.codes, args.scales.data, args.m, k, args.scales.stride, shape.across)
    to = expand.params
    weights = _carried(to.to_codes, to.to_scales, args.n, k, to.scale_row, shape.down)
    maps = [place.encode(matrix) for pair in zip(acts, weights, strict=True) for matrix in pair]
    grid = divide(args.m, args.n, shape, place.clusters_at_once(_w4a4(shape)))
    params = W4A4Params(*maps, grid, ceil_div(k, STEP), _finish(args, None, None))
    yield Start(_w4a4(shape), (grid.workers * shape.blocks, 1), params)


# ---- all there are ----


def kernels() -> Iterator[Kernel]:
    yield from map(_w8a8, (*W8A8_PAIRS, *W8A8_ALONE))
    yield from map(_w4a4, (*W4A4_SQUARES, *W4A4_ALONE))
    yield EXPAND
