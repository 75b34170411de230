"""Which kernel a call needs, and on how many blocks: what the host side of csrc/cuda/*.cu says, as a table.

It is for kernels that NVRTC compiled, to which no C++ leads. Tests record what the C++ launches for the same calls and
demand the same kernel, grid and parameters, to the byte. Those of Hopper alone are in
hopper.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from . import hopper
from .starts import Kernel, Place, Refused, Scratch, Start, ceil_div, check_aligned
from .structs import (
    DTYPES,
    KINDS,
    GeluParams,
    Gemm,
    GemmGelu,
    GemmInt8,
    Gemv,
    PartsParams,
    Quantize,
    QuantizeParams,
)

# ---- products ----


@dataclass(frozen=True)
class Tile:
    """The part of the output that a block of 128 threads computes."""

    name: str
    rows: int
    columns: int

    def blocks(self, m: int, n: int) -> int:
        return ceil_div(m, self.rows) * ceil_div(n, self.columns)


LARGE, SMALL = Tile("LargeTile", 128, 64), Tile("SmallTile", 64, 64)
LARGE_WIDE, SMALL_WIDE = Tile("LargeWideTile", 128, 128), Tile("SmallWideTile", 64, 64)


def _int4_bytes(tile: Tile) -> int:
    """Three stages of bytes and nibbles, 64 columns each, and two times four groups' scales."""
    return 3 * (64 * tile.rows + 32 * tile.columns) + 2 * 4 * 4 * (tile.rows + tile.columns)


def _nvfp4_bytes(tile: Tile) -> int:
    """Three stages, with four scales of a byte for each row."""
    return 3 * (64 * tile.rows + 32 * tile.columns + 4 * (tile.rows + tile.columns))


def _int8_bytes(tile: Tile) -> int:
    return 3 * 64 * (tile.rows + tile.columns)


@dataclass(frozen=True)
class Tiled:
    """A product's kernel for one tile."""

    tile: Tile
    kernel: Kernel


@dataclass(frozen=True)
class Product:
    """A product's two kernels; alignment: of codes and of weight codes, in bytes."""

    large: Tiled
    small: Tiled
    alignment: tuple[int, int]

    def start(self, args: ctypes.Structure) -> Start:
        chosen = self.tiled(args)
        return Start(chosen.kernel, (chosen.tile.blocks(args.m, args.n), 1), args)

    def tiled(self, args: ctypes.Structure) -> Tiled:
        """The kernel whose tile fills the card: 64 blocks are half a wave of a small one."""
        check_aligned("codes", args.codes, self.alignment[0])
        check_aligned("weight codes", args.weight_codes, self.alignment[1])
        few = args.m <= 64 or self.large.tile.blocks(args.m, args.n) < 64
        return self.small if few else self.large


def _product(
    header: str,
    name: str,
    shared_bytes: Callable[[Tile], int],
    *,
    alignment: tuple[int, int] = (16, 8),
    tiles: tuple[Tile, Tile] = (LARGE, SMALL),
) -> Product:
    """`name` in C++, with {} for the tile."""
    tiled = [Tiled(tile, Kernel(header, name.format(tile.name), 128, shared_bytes(tile))) for tile in tiles]
    return Product(*tiled, alignment)


INT4 = _product("gemm_int4", "gemm_int4_kernel<{}, Int4Product<false>>", _int4_bytes)
UINT4 = _product("gemm_int4", "gemm_int4_kernel<{}, Int4Product<true>>", _int4_bytes)
INT4_WIDE = _product("gemm_int4", "gemm_int4_kernel<{}, Int8Product>", _int4_bytes)
NVFP4 = _product("gemm_nvfp4", "gemm_nvfp4_kernel<{}>", _nvfp4_bytes)
MXF4 = _product("gemm_mxf4", "gemm_mxf4_kernel<{}>", _nvfp4_bytes)
INT8 = _product(
    "gemm_w8a8", "gemm_int8_kernel<{}>", _int8_bytes, alignment=(16, 16), tiles=(LARGE_WIDE, SMALL_WIDE)
)

PRODUCTS = {  # spelling -> kind of activation -> product
    "mma_s4": {"int4": INT4, "int4-unsigned": UINT4},
    "mma_sm75": {"int4": INT4, "int4-unsigned": UINT4},
    "mma_s8": {"int4": INT4_WIDE, "int4-unsigned": INT4_WIDE, "int8": INT8},
    "mma_f16": {"nvfp4": NVFP4},
    "mxf4_sm120": {"nvfp4": MXF4},
}
HOPPER = {  # kind of activation -> spelling -> the launches of a product
    "e4m3": {
        "wgmma_e4m3": partial(hopper.gemm_int4, in_clusters=False),
        "wgmma_e4m3_x4": partial(hopper.gemm_int4, in_clusters=True),
    },
    "int8": {
        "wgmma_s8": partial(hopper.gemm_int8, in_clusters=False),
        "wgmma_s8_x2": partial(hopper.gemm_int8, in_clusters=True),
    },
}


def gemm(spelling: str, kind: str, place: Place, args: Gemm | GemmInt8, scratch: Scratch) -> Iterable[Start]:
    """A product in a spelling; kind: of activations, a key of KINDS."""
    if spelling in HOPPER.get(kind, ()):
        return HOPPER[kind][spelling](place, args, scratch)
    product = PRODUCTS.get(spelling, {}).get(kind)
    if product is None:
        raise Refused(f"it has no product for {kind} activations")
    if product is INT8 and args.k % 16:
        raise Refused("K must be a multiple of 16")
    return [product.start(args)]


# ---- quantizers: 16 tokens a block of 256 threads, and so many ranks ----

LARGEST_CODE = {"int4": 7, "int4-unsigned": 15, "nvfp4": 6, "int8": 127}
CLAMPED = {"int4": (-8, 7), "int4-unsigned": (0, 15), "nvfp4": (0, 0), "int8": (-127, 127)}
TYPES = {"kF16": (32, 128), "kBF16": (32, 128), "kF32": (16,)}  # of x and down -> ranks a block


@cache
def _quantizer(kind: str, dtype: str, ranks: int) -> Kernel:
    """kind: of codes as they are written, "e4m3" for either int4."""
    if kind in ("int8", "e4m3"):
        name = f"quantize_{kind}"
        return Kernel(name, f"{name}_kernel<DType::{dtype}, {ranks}>", 256, 64 * ranks)
    e2m1 = "true" if kind == "nvfp4" else "false"
    return Kernel("quantize", f"quantize_kernel<DType::{dtype}, {e2m1}, {ranks}>", 256, 64 * ranks)


def quantize(kind: str, arch: int, args: Quantize, *, carried: bool = False) -> Start:
    """A quantizer on a card of compute capability arch / 10: by tensor cores where they take x and down.

    carried  int4 as Hopper's product reads it, which carrier.py describes
    """
    if args.x.dtype == DTYPES[torch.float8_e4m3fn]:
        raise Refused("activations must be fp32, bf16 or fp16")
    check_aligned("codes", args.codes, 16)
    same = args.down.dtype == args.x.dtype or args.r == 0
    dtype = _halves(args.x.dtype, arch) if same else "kF32"
    ranks = TYPES[dtype][-1 if args.r > 32 else 0]
    params = _quantize_params(kind, args)
    grid = ceil_div(args.m, 16), max(1, ceil_div(args.r, ranks))
    return Start(_quantizer("e4m3" if carried else kind, dtype, ranks), grid, params)


def _halves(dtype: int, arch: int) -> str:
    """The 16-bit type of tensor cores that numbers of a dtype have; kF32 for any other."""
    return {1: "kBF16" if arch >= 80 else "kF32", 2: "kF16"}.get(dtype, "kF32")


def _quantize_params(kind: str, args: Quantize) -> QuantizeParams:
    return QuantizeParams(args, 1.0 / LARGEST_CODE[kind], *CLAMPED[kind])


# ---- a product, GELU and the next layer's quantizer ----


_INT4_LOOP, _INT8_LOOP = "Int4Loop<{}, Int4Product<false>>", "Int4Loop<{}, Int8Product>"


def _fused(loop: str, shared_bytes: Callable[[Tile], int], dtypes: str = "kF16 kBF16") -> dict[str, Product]:
    kernels = {dtype: f"gemm_gelu_kernel<{loop}, DType::{dtype}>" for dtype in dtypes.split()}
    return {dtype: _product("gemm_gelu", name, shared_bytes) for dtype, name in kernels.items()}


FUSED = {  # format of both layers -> spelling -> 16-bit type of activations -> product
    "int4": {
        "gelu_s4": _fused(_INT4_LOOP, _int4_bytes),
        "gelu_sm75": _fused(_INT4_LOOP, _int4_bytes, "kF16"),
        "gelu_s8": _fused(_INT8_LOOP, _int4_bytes),
    },
    "nvfp4": {
        "gelu_mxf4": _fused("Mxf4Loop<{}>", _nvfp4_bytes),
        "gelu_f16": _fused("NvFp4Loop<{}>", _nvfp4_bytes),
    },
}
ADD_PARTS = Kernel("gemm_gelu", "add_parts_kernel<256>", 256, 0)


def gemm_gelu(spelling: str, arch: int, args: GemmGelu, kind: str, scratch: Scratch) -> Iterator[Start]:
    """W4A4, GELU and the quantizer of activations of a kind; hidden values in parts first where blocks share a row."""
    product, following = args.product, args.next
    _check_fused(arch, product, following)
    spellings = FUSED["nvfp4" if kind == "nvfp4" else "int4"]
    found = spellings.get(spelling, {}).get(_halves(following.x.dtype, arch))
    if found is None:
        raise Refused("it has no such product")
    chosen = found.tiled(product)
    check_aligned("codes", following.codes, 16)
    rows, tiles = ceil_div(product.m, chosen.tile.rows), product.n // chosen.tile.columns
    walk = _tiles_a_walk(rows, tiles) if chosen is found.large else 1
    runs, size = ceil_div(tiles, walk), product.m * following.r
    apart = runs > 1 and size > 0
    parts = scratch(4 * runs * size) if apart else following.hidden
    params = GeluParams(product, _quantize_params(kind, following), parts, walk)
    yield Start(chosen.kernel, (rows * runs, 1), params)
    if apart:
        yield Start(ADD_PARTS, (ceil_div(size, 256), 1), PartsParams(parts, following.hidden, runs, size))


def _check_fused(arch: int, product: Gemm, following: Quantize) -> None:
    if _halves(following.x.dtype, arch) == "kF32":
        raise Refused("activations must be fp16, or bf16")
    if following.r and following.down.dtype != following.x.dtype:
        raise Refused("down must be of the activations' type")
    if product.n % 64:
        raise Refused("N must be a multiple of 64")
    if product.kind == KINDS["int4-unsigned"]:
        raise Refused("the first layer's codes must be signed")


def _tiles_a_walk(rows: int, tiles: int) -> int:
    """Fewer parts are less memory to go through, but 1536 blocks must remain, or some wait for the last ones."""
    return min(max(rows * tiles // 1536, 1), 16)


# ---- AWQ: 32 outputs a block of 256 threads, and so many tokens ----

TOKENS = (1, 4, 8)


@cache
def _gemv(tokens: int) -> Kernel:
    return Kernel("gemv_awq", f"gemv_awq_kernel<{tokens}>", 256, 4 * 1024 * tokens)


def gemv(args: Gemv) -> Start:
    """An AWQ product."""
    check_aligned("weight codes", args.weight_codes, 4)
    tokens = next((few for few in TOKENS if args.m <= few), TOKENS[-1])
    return Start(_gemv(tokens), (ceil_div(args.n, 32), ceil_div(args.m, tokens)), args)


# ---- all there are ----


def _fused_products(arch: int) -> Iterator[Product]:
    names = ["gelu_s8", "gelu_f16"] if arch >= 80 else ["gelu_sm75"]
    names += ["gelu_s4"] if 80 <= arch < 90 else []
    names += ["gelu_mxf4"] if arch // 10 == 12 else []
    every = FUSED["int4"] | FUSED["nvfp4"]
    for name in names:
        yield from every[name].values()


def kernels(arch: int) -> Iterator[Kernel]:
    """Those that a card of compute capability arch / 10 can run."""
    products = [INT4_WIDE, INT8, NVFP4]
    products += [INT4, UINT4] if arch < 90 else []
    products += [MXF4] if arch // 10 == 12 else []
    products += _fused_products(arch)
    for product in products:
        yield from (product.large.kernel, product.small.kernel)
    yield from hopper.kernels() if arch == 90 else ()
    for kind in ("int4", "nvfp4", "int8", *(["e4m3"] if arch == 90 else [])):
        for dtype, ranks in TYPES.items():
            if dtype != "kBF16" or arch >= 80:
                yield from map(partial(_quantizer, kind, dtype), ranks)
    yield from map(_gemv, TOKENS)
    yield ADD_PARTS
