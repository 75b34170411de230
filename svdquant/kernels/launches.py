"""Which kernel a call needs, and on how many blocks: what the host side of csrc/cuda/*.cu says, as a table.

It is for kernels that NVRTC compiled, to which no C++ leads. Tests record what the C++ launches for the same calls and
demand the same kernel, grid and parameters, to the byte. Kernels are called by their C++ names, of csrc/cuda/*.cuh;
those for Hopper alone are left out, as machines with such cards have compilers, and fused ones, whose ops run apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from .structs import DTYPES, Gemm, GemmInt8, Gemv, Quantize, QuantizeParams


class Refused(RuntimeError):
    """What a kernel cannot do, in half a sentence."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is started.

    header   in csrc/cuda, without its suffix
    name     in C++, in namespace svdquant::cuda
    threads  of a block; shared_bytes likewise
    """

    header: str
    name: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Start:
    """One launch."""

    kernel: Kernel
    grid: tuple[int, int]
    params: ctypes.Structure


def _blocks(count: int, each: int) -> int:
    return -(-count // each)


# ---- products ----


@dataclass(frozen=True)
class Tile:
    """The part of the output that a block of 128 threads computes."""

    name: str
    rows: int
    columns: int

    def blocks(self, m: int, n: int) -> int:
        return _blocks(m, self.rows) * _blocks(n, self.columns)


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
        """With the tile that fills the card: 64 blocks are half a wave of a small one."""
        _check_aligned("codes", args.codes, self.alignment[0])
        _check_aligned("weight codes", args.weight_codes, self.alignment[1])
        m, n = args.m, args.n
        few = m <= 64 or self.large.tile.blocks(m, n) < 64
        chosen = self.small if few else self.large
        return Start(chosen.kernel, (chosen.tile.blocks(m, n), 1), args)


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


def _check_aligned(name: str, address: int | None, multiple: int) -> None:
    if (address or 0) % multiple:
        raise Refused(f"{name} must begin at a multiple of {multiple} bytes")


def gemm(spelling: str, kind: str, args: Gemm | GemmInt8) -> Start:
    """A product in a spelling; kind: of activations, a key of KINDS."""
    product = PRODUCTS.get(spelling, {}).get(kind)
    if product is None:
        raise Refused(f"it has no product for {kind} activations")
    if product is INT8 and args.k % 16:
        raise Refused("K must be a multiple of 16")
    return product.start(args)


# ---- quantizers: 16 tokens a block of 256 threads, and so many ranks ----

LARGEST_CODE = {"int4": 7, "int4-unsigned": 15, "nvfp4": 6, "int8": 127}
CLAMPED = {"int4": (-8, 7), "int4-unsigned": (0, 15), "nvfp4": (0, 0), "int8": (-127, 127)}
TYPES = {"kF16": (32, 128), "kBF16": (32, 128), "kF32": (16,)}  # of x and down -> ranks a block


@cache
def _quantizer(kind: str, dtype: str, ranks: int) -> Kernel:
    if kind == "int8":
        return Kernel("quantize_int8", f"quantize_int8_kernel<DType::{dtype}, {ranks}>", 256, 64 * ranks)
    e2m1 = "true" if kind == "nvfp4" else "false"
    return Kernel("quantize", f"quantize_kernel<DType::{dtype}, {e2m1}, {ranks}>", 256, 64 * ranks)


def quantize(kind: str, arch: int, args: Quantize) -> Start:
    """A quantizer on a card of compute capability arch / 10: by tensor cores where they take x and down."""
    if args.x.dtype == DTYPES[torch.float8_e4m3fn]:
        raise Refused("activations must be fp32, bf16 or fp16")
    _check_aligned("codes", args.codes, 16)
    same = args.down.dtype == args.x.dtype or args.r == 0
    tensor = {1: "kBF16" if arch >= 80 else "kF32", 2: "kF16"}.get(args.x.dtype, "kF32")
    dtype = tensor if same else "kF32"
    ranks = TYPES[dtype][-1 if args.r > 32 else 0]
    params = QuantizeParams(args, 1.0 / LARGEST_CODE[kind], *CLAMPED[kind])
    grid = _blocks(args.m, 16), max(1, _blocks(args.r, ranks))
    return Start(_quantizer(kind, dtype, ranks), grid, params)


# ---- AWQ: 32 outputs a block of 256 threads, and so many tokens ----

TOKENS = (1, 4, 8)


@cache
def _gemv(tokens: int) -> Kernel:
    return Kernel("gemv_awq", f"gemv_awq_kernel<{tokens}>", 256, 4 * 1024 * tokens)


def gemv(args: Gemv) -> Start:
    """An AWQ product."""
    _check_aligned("weight codes", args.weight_codes, 4)
    tokens = next((few for few in TOKENS if args.m <= few), TOKENS[-1])
    return Start(_gemv(tokens), (_blocks(args.n, 32), _blocks(args.m, tokens)), args)


# ---- all there are ----


def kernels(arch: int) -> Iterator[Kernel]:
    """Those that a card of compute capability arch / 10 can run."""
    products = [INT4_WIDE, INT8, NVFP4]
    products += [INT4, UINT4] if arch < 90 else []
    products += [MXF4] if arch // 10 == 12 else []
    for product in products:
        yield from (product.large.kernel, product.small.kernel)
    for kind in ("int4", "nvfp4", "int8"):
        for dtype, ranks in TYPES.items():
            if dtype != "kBF16" or arch >= 80:
                yield from map(partial(_quantizer, kind, dtype), ranks)
    yield from map(_gemv, TOKENS)
