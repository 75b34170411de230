"""The CUDA kernels on a CPU: the .cu sources compiled as plain C++ over tests/kernels/emulator, called by ctypes.

`library(arch)` builds the library for one card, and keeps it beside pytest's other files until a source changes. Every
call hands over exactly its tensors: an access outside them, a race or a stray barrier comes back as a `KernelError`
with the emulator's sentence.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from svdquant_nodes.svdquant.core.weights import LinearWeights
from svdquant_nodes.svdquant.kernels import carrier, launches, select
from svdquant_nodes.svdquant.kernels.structs import (
    DTYPES,
    KINDS,
    Floats,
    Gemm,
    GemmGelu,
    GemmInt8,
    Gemv,
    Output,
    Quantize,
)

ROOT = Path(__file__).resolve().parents[2]
CUDA, EMULATOR = ROOT / "csrc" / "cuda", Path(__file__).parent / "emulator"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fno-gnu-unique",  # or cards loaded one after the other would share their statics: kernels known by name, too
]
KEPT = ROOT / ".pytest_cache" / "emulated"
COMPILER = shutil.which("g++")
SOURCES = tuple(sorted(CUDA.glob("*.cu")))


class KernelError(RuntimeError):
    """A kernel did what a GPU leaves undefined, or refused its arguments."""


STRUCTS = (Floats, Quantize, Gemm, GemmInt8, Gemv, GemmGelu)


def built(arch: int) -> Path | str:
    """A library of the kernels as they are for a card of compute capability arch / 10, or why they do not compile."""
    path = KEPT / f"sm{arch}-{_digest(arch)}.so"
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / f"sm{arch}.lock"):
        if not path.exists() and (problem := _build(arch, path)):
            return problem
    return path


@functools.cache
def library(arch: int) -> ctypes.CDLL | str:
    """The same, loaded."""
    path = built(arch)
    if isinstance(path, str):
        return path
    loaded = ctypes.CDLL(str(path))
    for which, struct in enumerate(STRUCTS):
        if loaded.size_of_struct(which) != ctypes.sizeof(struct):
            return f"{struct.__name__} is not what csrc/launch.h says: adapt this file"
    return loaded


def ready(arch: int, *, backwards: bool = False, sms: int = 4) -> ctypes.CDLL:
    """The library with nothing left of the calls before: it knows of no tensor, and runs warps as said here."""
    kernels = library(arch)
    if isinstance(kernels, str):
        raise KernelError(kernels)
    kernels.forget()
    kernels.run_backwards(backwards)
    kernels.set_multiprocessors(sms)
    return kernels


def _flags(arch: int) -> list[str]:
    return [*FLAGS, f"-DSVDQUANT_ARCH={arch}", f"-I{CUDA}", f"-I{EMULATOR}"]


def _digest(arch: int) -> str:
    """Of all a library is made of."""
    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True).stdout
    headers = [CUDA.parent / "launch.h", *CUDA.glob("*.cuh"), *EMULATOR.glob("*.h")]
    files = sorted([*SOURCES, *headers, *EMULATOR.glob("*.cpp")])
    made_of = [repr((_flags(arch), _named(arch))).encode(), version, *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]


def _named(arch: int) -> dict[str, str]:
    """A file for each header of kernels, which makes them known by the names that launches.py calls them."""
    headers = {kernel.header: [] for kernel in launches.kernels(arch)}
    for kernel in launches.kernels(arch):
        headers[kernel.header].append(f'emulator::know("{kernel.name}", {kernel.name})')
    return {
        header: f"""#include "{header}.cuh"
using namespace svdquant;
using namespace svdquant::cuda;
[[maybe_unused]] static const bool kKnown[] = {{{", ".join(known)}}};
"""
        for header, known in headers.items()
    }


def _write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def _build(arch: int, path: Path) -> str | None:
    """Compile, and leave no older library of this card; why it failed, or None."""
    with tempfile.TemporaryDirectory(prefix="emulated-", dir=KEPT) as folder:

        def compiled(source: Path) -> Path:
            to = Path(folder, f"{source.stem}.o")
            command = [COMPILER, *_flags(arch), "-x", "c++", "-c", source, "-o", to]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return to

        named = [_write(Path(folder, f"{header}_named.cpp"), text) for header, text in _named(arch).items()]
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compiled, [*SOURCES, *EMULATOR.glob("*.cpp"), *named]))
        except subprocess.CalledProcessError as e:
            return f"{e.cmd[-3].name} is no C++: {e.stderr}"
        linked = Path(folder, path.name)
        subprocess.run([COMPILER, "-shared", *objects, "-o", linked], check=True)
        for older in KEPT.glob(f"sm{arch}-*.so"):
            older.unlink()
        linked.rename(path)
    return None


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output no byte of which was written."""
    return torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8).view(dtype).reshape(shape)


@dataclass(frozen=True)
class Kernels:
    """The kernels of one card, with warps in order or backwards, and with so many SMs."""

    arch: int
    backwards: bool = False
    sms: int = 4

    def quantize(
        self, kind: str, x: Tensor, smooth: Tensor, down: Tensor, *, shift: float = 0.0, carried: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As core.reference.quantize_*; carried: int4 as carrier.py says."""
        (m, k), r = x.shape, down.shape[0]
        group, dtype = {"nvfp4": (16, torch.float8_e4m3fn), "int8": (k, torch.float32)}.get(
            kind, (64, x.dtype)
        )
        codes = _poisoned(m, k, dtype=torch.int8 if kind in ("int4", "int8") else torch.uint8)
        scales, hidden = _poisoned(m, k // group, dtype=dtype), _poisoned(m, r, dtype=torch.float32)
        if carried:
            codes, scales = (t.fill_(torch.nan) for t in carrier.empty(x, m, k))
        made = codes, scales, hidden
        factors, scale_row = map(_floats, (x, smooth, down)), scales.stride(1) if carried else 0
        args = Quantize(KINDS[kind], m, k, r, *factors, shift, *map(_data, made), scale_row)
        name = "quantize_e4m3" if carried else f"quantize_{kind.partition('-')[0]}"
        self._call(name, args, read=(x, smooth, down), written=made)
        return made

    def gemm(
        self,
        product: str,
        kind: str,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """As core.reference.gemm_*; `product` is int4, int8 or nvfp4: the tensor cores to use."""
        (m, k), n, w = codes.shape, weights.out_features, weights
        out = _poisoned(m, n, dtype=dtype) if out is None else out
        factors = map(_floats, (w.scales, w.second_scale, w.up, w.bias, addend))
        of_acts = _by_group(scales) if kind == "e4m3" else _floats(scales)
        pointers = _data(codes), of_acts, _data(hidden), _data(w.codes)
        args = Gemm(KINDS[kind], m, n, k, w.rank, *pointers, *factors, _output(out))
        read = (codes, scales, hidden, w.codes, w.scales, w.second_scale, w.up, w.bias, addend)
        self._call(f"gemm_by_{product}", args, read=read, written=(out,))
        return out

    def gemm_gelu(
        self,
        product: str,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        following: LinearWeights,
        *,
        dtype: torch.dtype = torch.bfloat16,
        walk: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As core.reference.gemm_*_gelu; `product` is the tensor cores to use, `walk` how many tiles a block takes."""
        (m, k), n, w, then = codes.shape, weights.out_features, weights, following
        in_floats = then.spec.format == "nvfp4"
        kind = "int4-unsigned" if then.spec.act_shift else then.spec.format
        made = (
            _poisoned(m, n, dtype=torch.int8 if kind == "int4" else torch.uint8),
            _poisoned(m, n // then.spec.group, dtype=torch.float8_e4m3fn if in_floats else dtype),
            _poisoned(m, then.rank, dtype=torch.float32),
        )
        factors = map(_floats, (w.scales, w.second_scale, w.up, w.bias, None))
        pointers = _data(codes), _floats(scales), _data(hidden), _data(w.codes)
        own = KINDS["nvfp4" if in_floats else "int4-unsigned" if codes.dtype == torch.uint8 else "int4"]
        first = Gemm(own, m, n, k, w.rank, *pointers, *factors, Output(None, DTYPES[dtype], 0))
        floats = Floats(None, DTYPES[dtype], 0), _floats(then.smooth), _floats(then.down)
        behind = Quantize(KINDS[kind], m, n, then.rank, *floats, then.spec.act_shift, *map(_data, made))
        name, rest = ("gemm_gelu_walking", [walk]) if walk else (f"gemm_gelu_by_{product}", [])
        own_tensors = (w.codes, w.scales, w.second_scale, w.up, w.bias)
        read = (codes, scales, hidden, *own_tensors, then.smooth, then.down)
        self._call(name, GemmGelu(first, behind), *rest, read=read, written=made)
        return made

    def gemm_int8(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        addend: Tensor | None = None,
        entry: str = "gemm_w8a8",
    ) -> Tensor:
        """As core.reference.gemm_int8."""
        (m, k), n, w = codes.shape, weights.out_features, weights
        out = _poisoned(m, n, dtype=dtype) if out is None else out
        read = (codes, scales, hidden, w.codes, w.scales, w.up, w.bias, addend)
        factors = _floats(w.up), _floats(w.bias), _floats(addend)
        args = GemmInt8(m, n, k, w.rank, *map(_data, read[:5]), *factors, _output(out))
        self._call(entry, args, read=read, written=(out,))
        return out

    def gemv(
        self,
        x: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """As core.reference.gemv_awq."""
        (m, k), n, w = x.shape, weights.out_features, weights
        out = _poisoned(m, n, dtype=dtype) if out is None else out
        factors = (_floats(w.scales), _floats(w.zeros), _floats(w.bias), _floats(addend))
        args = Gemv(m, n, k, w.spec.group, _floats(x), _data(w.codes), *factors, _output(out))
        self._call("gemv", args, read=(x, w.codes, w.scales, w.zeros, w.bias, addend), written=(out,))
        return out

    def _call(
        self, name: str, *args: object, read: tuple[Tensor | None, ...], written: tuple[Tensor, ...]
    ) -> None:
        kernels = ready(self.arch, backwards=self.backwards, sms=self.sms)
        for tensors, writable in ((read, False), (written, True)):
            for t in tensors:
                if t is not None and t.numel():
                    kernels.allow(ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(_extent(t)), writable)
        function = getattr(kernels, name)
        function.restype = ctypes.c_char_p
        problem = function(*(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in args))
        if problem:
            raise KernelError(problem.decode())


def _data(t: Tensor | None) -> int | None:
    return t.data_ptr() if t is not None and t.numel() else None


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    return (
        sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) + 1
    ) * t.element_size()


def _output(t: Tensor) -> Output:
    return Output(_data(t), DTYPES[t.dtype], t.stride(0))


def _floats(t: Tensor | None) -> Floats:
    if t is None:
        return Floats(None, 0, 0)
    stride = 0 if t.ndim == 1 and t.numel() == 1 else t.stride(0)
    return Floats(_data(t), DTYPES[t.dtype], stride)


def _by_group(t: Tensor) -> Floats:
    return Floats(_data(t), DTYPES[t.dtype], t.stride(1))


@dataclass(frozen=True)
class EmulatedOps:
    """core.reference's signatures over a GPU library's entry points, for one card and spelling."""

    arch: int
    spelling: str

    def _kernels(self) -> Kernels:
        return Entered(self.arch, spelling=self.spelling)

    @property
    def _carried(self) -> bool:
        return self.spelling in select.E4M3

    def quantize_int4(self, x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._kernels().quantize("int4", x, smooth, down, carried=self._carried)

    def quantize_int4_unsigned(
        self, x: Tensor, smooth: Tensor, down: Tensor, shift: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._kernels().quantize("int4-unsigned", x, smooth, down, shift=shift, carried=self._carried)

    def quantize_nvfp4(self, x: Tensor, smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._kernels().quantize("nvfp4", x, smooth, down)

    def gemm_int4(
        self, codes: Tensor, scales: Tensor, hidden: Tensor, weights: LinearWeights, **to: object
    ) -> Tensor:
        kind = "int4-unsigned" if codes.dtype == torch.uint8 else "int4"
        if self._carried:
            kind, (codes, scales) = "e4m3", carrier.carried(codes, scales)
        return self._kernels().gemm("", kind, codes, scales, hidden, weights, **to)

    def gemm_int4_gelu(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        following: LinearWeights,
        *,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._kernels().gemm_gelu("", codes, scales, hidden, weights, following, dtype=dtype)

    def gemm_nvfp4(
        self, codes: Tensor, scales: Tensor, hidden: Tensor, weights: LinearWeights, **to: object
    ) -> Tensor:
        return self._kernels().gemm("", "nvfp4", codes, scales, hidden, weights, **to)

    gemm_nvfp4_gelu = gemm_int4_gelu

    def quantize_int8(
        self, x: Tensor, smooth: Tensor, down: Tensor, shift: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._kernels().quantize("int8", x, smooth, down, shift=shift)

    def gemm_int8(
        self, codes: Tensor, scales: Tensor, hidden: Tensor, weights: LinearWeights, **to: object
    ) -> Tensor:
        return self._kernels().gemm_int8(codes, scales, hidden, weights, **to)

    def gemv_awq(self, x: Tensor, weights: LinearWeights, **to: object) -> Tensor:
        return self._kernels().gemv(x, weights, **to)


@dataclass(frozen=True)
class Entered(Kernels):
    """The same kernels, called as ops.cpp calls them: by the name of a spelling."""

    spelling: str = ""

    def _call(self, name: str, *args: object, **tensors: tuple[Tensor | None, ...]) -> None:
        whole = ("gemm_w8a8", "gemm_gelu")
        kind = next((x for x in whole if name.startswith(x)), name.partition("_")[0])
        entry = f"enter_{kind}"
        super()._call(entry, self.spelling.encode(), *args, **tensors)
