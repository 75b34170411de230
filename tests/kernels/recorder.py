"""Run as a program by test_launches.py: what csrc/ops.cpp launches for each case, and what cuda_ops.py does.

csrc/ops.cpp is compiled for CPU tensors and linked with the .cu files on the emulated card, which records launches
instead of running them. Both sides get the same tensors. Says in JSON, for each case, two lists of launches or errors.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import pack

pack.alias()

import torch  # noqa: E402

from svdquant_nodes.svdquant.kernels import arguments, cuda_ops, launches, ops, structs  # noqa: E402
from svdquant_nodes.svdquant.kernels.driver import Card, Driver  # noqa: E402
from svdquant_nodes.svdquant.kernels.starts import Start  # noqa: E402
from svdquant_nodes.tests.kernels.fake_driver import EmulatedMap, Functions, Grid, compiled  # noqa: E402
from svdquant_nodes.tests.kernels.launch_cases import cases  # noqa: E402

MULTIPROCESSORS = 132
PARAMS = {  # header or name of a kernel -> what it takes, where that is not Gemm
    "add_parts_kernel<256>": structs.PartsParams,
    "quantize": structs.QuantizeParams,
    "quantize_int8": structs.QuantizeParams,
    "quantize_e4m3": structs.QuantizeParams,
    "gemm_gelu": structs.GeluParams,
    "gemm_w8a8": structs.GemmInt8,
    "gemv_awq": structs.Gemv,
    "hopper_w8a8": structs.W8A8Params,
    "hopper_w4a4": structs.W4A4Params,
    "hopper_expand": structs.Expand,
}
NAMES = {  # of dtypes in C++ and in Python
    f"got {there}": f"got {here}"
    for there, here in {"Char": "int8", "Byte": "uint8", "Float8_": "float8_", "BFloat16": "bfloat16"}.items()
} | {"got Float ": "got float32 "}


class Recording(Card):
    """The card of the Python side."""

    def __init__(self, arch: int) -> None:
        super().__init__(Driver(Functions(multiprocessors=MULTIPROCESSORS)), 0, arch)
        self.load(compiled(launches.kernels(arch)), launches.kernels(arch))
        self.starts = []

    def launch(self, start: Start) -> None:
        self.starts.append(start)


class Allocations(list):
    """(address, bytes) of the Python side's scratch memory, while it is entered."""

    def __enter__(self) -> Allocations:
        self._scratch = arguments.Kept.scratch
        arguments.Kept.scratch = lambda *of: self._record(*of)  # a function, which becomes a method
        return self

    def __exit__(self, *_: object) -> None:
        arguments.Kept.scratch = self._scratch

    def _record(self, kept: arguments.Kept, like: torch.Tensor, size: int) -> int:
        self.append((self._scratch(kept, like, size), size))
        return self[-1][0]


@dataclass(frozen=True)
class Memory:
    """Names for addresses, the same on both sides.

    tensors   address -> name: of arguments and results
    scratch   (address, bytes)
    """

    tensors: dict[int, str]
    scratch: list[tuple[int, int]]

    def name(self, address: int | None) -> str | None:
        for i, (begin, size) in enumerate(self.scratch):
            if begin <= (address or 0) < begin + size:
                return f"scratch {i} + {address - begin}"
        return self.tensors.get(address, "a copy") if address else None

    def fields(self, struct: ctypes.Structure, path: str = "") -> dict[str, Any]:
        """Every number in a struct by its path, addresses by their names."""
        found: dict[str, Any] = {}
        for name, kind in struct._fields_:
            value, where = getattr(struct, name), f"{path}{name}"
            if kind is structs.TensorMap:
                value = EmulatedMap.from_buffer_copy(value)
            if name == "_gap":
                continue
            if isinstance(value, ctypes.Structure):
                found |= self.fields(value, f"{where}.")
            elif isinstance(value, ctypes.Array):
                found[where] = list(value)
            else:
                found[where] = self.name(value) if kind is ctypes.c_void_p else value
        return found


def memory(arguments_: tuple[Any, ...], made: Any, scratch: list[tuple[int, int]]) -> Memory:
    tensors = {"argument": arguments_, "result": made if isinstance(made, tuple) else ()}
    named = {
        t.data_ptr(): f"{what} {i}"
        for what, some in tensors.items()
        for i, t in enumerate(some)
        if isinstance(t, torch.Tensor) and t.numel()
    }
    return Memory(named, scratch)


def allocations(library: ctypes.CDLL) -> list[tuple[int, int]]:
    """The C++ side's scratch memory."""
    library.allocation.restype, found = ctypes.c_int64, []
    for i in range(library.allocations()):
        at = ctypes.c_void_p()
        size = library.allocation(i, ctypes.byref(at))
        found.append((at.value, size))
    return found


def of_cpp(library: ctypes.CDLL, there: Memory, arch: int) -> list[Any]:
    headers = {kernel.name: kernel.header for kernel in launches.kernels(arch)}
    library.recorded_name.restype = ctypes.c_char_p
    found = []
    for i in range(library.recorded()):
        name, grid, data = library.recorded_name(i).decode(), Grid(), ctypes.c_void_p()
        library.recorded_grid(i, ctypes.byref(grid))
        size = library.recorded_params(i, ctypes.byref(data))
        kind = PARAMS.get(name) or PARAMS.get(headers.get(name, ""), structs.Gemm)
        params = there.fields(kind.from_address(data.value))
        found.append([name, [grid.x, grid.y], grid.threads, grid.shared_bytes, size, params])
    return found


def of_python(starts: list[Start], there: Memory) -> list[Any]:
    found = []
    for start in starts:
        kernel, params = start.kernel, start.params
        shape = kernel.name, list(start.grid), kernel.threads, kernel.shared_bytes
        found.append([*shape, ctypes.sizeof(params), there.fields(params)])
    return found


def outcome(call: Any, arguments: tuple[Any, ...]) -> tuple[Any, str]:
    try:
        return call(*arguments), ""
    except (RuntimeError, ValueError) as error:
        return None, functools.reduce(
            lambda text, name: text.replace(*name), NAMES.items(), str(error).splitlines()[0]
        )


def by_cpp(loaded: ctypes.CDLL, arch: int, op: str, given: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """What the C++ side did, and what came back."""
    loaded.record(True)
    made, problem = outcome(getattr(torch.ops.svdquant, op), given)
    scratch = allocations(loaded)
    did = of_cpp(loaded, memory(given, made, scratch), arch)
    return [*did, *[size for _, size in scratch], problem], results(made)


def by_python(arch: int, op: str, given: tuple[Any, ...]) -> tuple[list[Any], Any]:
    card = Recording(arch)
    with Allocations() as scratch:
        made, problem = outcome(getattr(cuda_ops.CudaOps(lambda _: card), op), given)
    did = of_python(card.starts, memory(given, made, scratch))
    return [*did, *[size for _, size in scratch], problem], results(made)


def main(emulator: str, library: str, arch: int) -> None:
    loaded = ctypes.CDLL(emulator, ctypes.RTLD_GLOBAL)
    loaded.set_multiprocessors(MULTIPROCESSORS)
    ops.declare()
    torch.ops.load_library(library)
    said = {}
    for name, (op, given) in cases(arch).items():
        sides = by_cpp(loaded, arch, op, given), by_python(arch, op, given)
        said[name] = dict(cpp=sides[0][0], python=sides[1][0], results=[made for _, made in sides])
    print(json.dumps(said))


def results(made: Any) -> list[Any]:
    """Shapes and dtypes of what came back."""
    tensors = made if isinstance(made, tuple) else () if made is None else (made,)
    return [[list(t.shape), list(t.stride()), str(t.dtype)] for t in tensors]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
