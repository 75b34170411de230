"""A CUDA driver of Python: its functions as driver.py calls them, over the emulated card or over nothing.

`Functions(arch)` runs every launch on tests/kernels/emulator; without an arch launches only join a list. `fails` names
functions that answer with an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from svdquant_nodes.svdquant.kernels import cubins, launches
from svdquant_nodes.svdquant.kernels.driver import Card, Driver
from svdquant_nodes.tests.kernels.emulated import ready

STREAM, CONTEXT, MODULE = 0x5000, 0xC000, 0x3000
WORDS = {1: b"invalid argument", 209: b"no kernel image is available for execution on the device"}


class Grid(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_int64),
        ("y", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("cluster", ctypes.c_int),
    ]


class EmulatedMap(ctypes.Structure):
    """What the emulated copy engine is told about a matrix."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("box_rows", "box_columns", "element_bytes")),
        ("swizzled", ctypes.c_bool),
    ]


@dataclass
class Functions:
    """What stands for libcuda.

    arch             of the emulated card that launches run on, None for none
    fails            name of a function -> its error
    called           names of all functions that were called, in order
    launched         name of a kernel, grid, threads, bytes of shared memory, stream
    multiprocessors  of the card
    """

    arch: int | None = None
    fails: dict[str, int] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)
    multiprocessors: int = 4
    _names: list[str] = field(default_factory=list)
    _contexts: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            self.called.append(name)
            if name in self.fails:
                return self.fails[name]
            return getattr(self, f"_{name[2:]}")(*arguments) or 0

        return function

    def _Init(self, flags: int) -> None:
        assert flags == 0

    def _GetErrorString(self, code: int, to: Any) -> int:
        to._obj.value = WORDS.get(code)
        return 0 if code in WORDS else 1

    def _DriverGetVersion(self, to: Any) -> None:
        to._obj.value = 13000

    def _DeviceGet(self, to: Any, index: int) -> None:
        to._obj.value = index

    def _DevicePrimaryCtxRetain(self, to: Any, device: ctypes.c_int) -> None:
        to._obj.value = CONTEXT + device.value

    def _CtxPushCurrent_v2(self, context: ctypes.c_void_p) -> None:
        self._contexts.append(context.value)

    def _CtxPopCurrent_v2(self, to: Any) -> None:
        to._obj.value = self._contexts.pop()

    def _ModuleLoadData(self, to: Any, code: bytes) -> None:
        assert self._contexts and code
        to._obj.value = MODULE

    def _ModuleGetFunction(self, to: Any, module: ctypes.c_void_p, name: bytes) -> None:
        assert self._contexts and module.value == MODULE
        self._names.append(name.decode())
        to._obj.value = len(self._names)

    def _FuncSetAttribute(self, function: ctypes.c_void_p, which: int, value: int) -> None:
        assert which == 8 and value > 48 * 1024

    def _DeviceGetAttribute(self, to: Any, which: int, device: ctypes.c_int) -> None:
        assert which == 16
        to._obj.value = self.multiprocessors

    def _OccupancyMaxActiveClusters(self, to: Any, function: ctypes.c_void_p, config: Any) -> None:
        """As many as there are processors for, the last one of fewer: as the emulator's run.cuh says."""
        assert self._contexts and self._names[function.value - 1] and not config._obj.attribute_count
        to._obj.value = -(-self.multiprocessors // config._obj.grid_x)

    def _TensorMapEncodeTiled(self, to: Any, kind: int, rank: int, address: Any, *rest: Any) -> int:
        """The map as the emulator has it, if the driver would take it: the conditions of CUDA's documentation."""
        sizes, strides, box, steps, interleave, swizzle, promotion, fill = rest
        at, element = ctypes.cast(to, ctypes.c_void_p).value, {0: 1, 7: 4}[kind]
        inner = box[0] * element
        assert self._contexts
        conditions = (
            at % 128 == 0,
            rank == len(sizes) == len(box) == len(steps) == len(strides) + 1,
            address.value % 16 == 0,
            all(0 < size <= 2**32 for size in sizes),
            all(stride % 16 == 0 and stride < 2**40 for stride in strides),
            strides[0] >= sizes[0] * element,
            all(0 < size <= 256 for size in box),
            all(0 < step <= 8 for step in steps),
            inner % 16 == 0,
            interleave == fill == 0 and swizzle in (0, 3) and promotion in range(4),
            swizzle == 0 or inner <= 128,
        )
        if not all(conditions):
            return 1
        told = EmulatedMap(address, sizes[1], sizes[0], strides[0], box[1], box[0], element, swizzle == 3)
        ctypes.memmove(at, ctypes.byref(told), ctypes.sizeof(told))
        return 0

    def _LaunchKernel(self, function: ctypes.c_void_p, *arguments: Any) -> int:
        x, y, z, threads, one, also_one, shared, stream, params, extra = arguments
        assert self._contexts and (z, one, also_one, extra) == (1, 1, 1, None)
        name = self._names[function.value - 1].removeprefix("_Z")
        self.launched.append((name, (x, y), threads, shared, stream.value))
        if not self.arch:
            return 0
        cluster = {kernel.name: kernel.cluster for kernel in launches.kernels(self.arch)}[name]
        return self._run(name, Grid(x, y, threads, shared, cluster), params[0])

    def _run(self, name: str, grid: Grid, params: int) -> int:
        launch = ready(self.arch).launch
        launch.restype = ctypes.c_char_p
        problem = launch(name.encode(), ctypes.byref(grid), ctypes.c_void_p(params))
        WORDS[700] = problem
        return 700 if problem else 0


def compiled(kernels: Iterable[launches.Kernel]) -> list[cubins.Cubin]:
    """Cubins of two kernels each, in which a kernel is called as in C++ with _Z before it."""
    names = [kernel.name for kernel in kernels]
    pairs = [names[i : i + 2] for i in range(0, len(names), 2)]
    return [cubins.Cubin(b"code", {name: f"_Z{name}" for name in pair}) for pair in pairs]


def card(arch: int, functions: Functions, index: int = 0) -> Card:
    """A card with all its kernels."""
    found = Card(Driver(functions), index, arch, stream=lambda: STREAM)
    found.load(compiled(launches.kernels(arch)), launches.kernels(arch))
    return found
