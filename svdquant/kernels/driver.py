"""The CUDA driver by ctypes, as far as starting kernels takes: a card's modules, its functions, a launch.

Everything happens in the device's primary context, which is torch's. A launch goes to torch's current stream, waits for
nothing and allocates nothing, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from .cache import Unavailable
from .cubins import Cubin
from .starts import Kernel, Matrix, Start, ceil_div
from .structs import MAP_ALIGNMENT, LaunchConfig, TensorMap

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MOST_UNASKED = 48 * 1024  # bytes of shared memory that every card grants
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_UINT8, _FLOAT32 = 0, 7  # CU_TENSOR_MAP_DATA_TYPE_*
_SWIZZLE_128B, _PROMOTION_256B = 3, 3  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B


class DriverError(RuntimeError):
    """The driver's own sentence about what went wrong."""


class Driver:
    """The driver's functions, each called by its name without the prefix."""

    def __init__(self, functions: Any) -> None:
        """`functions`: an object with cuInit, cuLaunchKernel and the rest, which return 0 if all went well."""
        self._functions = functions
        self.call("Init", 0)

    def call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._functions, f"cu{name}")
        except AttributeError:
            raise DriverError(f"the driver has no cu{name}, a newer one is needed") from None
        code = function(*arguments)
        if code:
            raise DriverError(f"cu{name}: {self._words(code)}")

    def version(self) -> int:
        """Of the CUDA that it is for: 13000."""
        number = ctypes.c_int()
        self.call("DriverGetVersion", ctypes.byref(number))
        return number.value

    def _words(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._functions.cuGetErrorString(code, ctypes.byref(text)) or not text.value:
            return f"error {code}"
        return text.value.decode()


def open_driver() -> Driver:
    """The driver of this machine; raises Unavailable."""
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except (OSError, DriverError) as error:
        raise Unavailable(
            f"the CUDA driver cannot be used ({error})", "Install NVIDIA's driver anew, then restart."
        ) from error


class Card:
    """One GPU with its kernels loaded.

    arch  ten times its compute capability
    """

    def __init__(
        self,
        driver: Driver,
        index: int,
        arch: int,
        stream: Callable[[], int] | None = None,
    ) -> None:
        """`stream`: what to ask for the stream of a launch, torch's current one on that GPU if None."""
        self.arch = arch
        self._driver, self._functions, self._clusters = driver, {}, {}
        self._stream = stream or (lambda: torch.cuda.current_stream(index).cuda_stream)
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        driver.call("DeviceGet", ctypes.byref(self._device), index)
        driver.call("DevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    def load(self, cubins: Iterable[Cubin], kernels: Iterable[Kernel]) -> None:
        """Bring kernels onto the card: what the cubins have of them, by their C++ names."""
        known = {kernel.name: kernel for kernel in kernels}
        with _Current(self._driver, self._context):
            for cubin in cubins:
                module = ctypes.c_void_p()
                self._driver.call("ModuleLoadData", ctypes.byref(module), cubin.code)
                for name, there in cubin.kernels.items():
                    self._functions[name] = self._function(module, there, known[name])

    def _function(self, module: ctypes.c_void_p, name: str, kernel: Kernel) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._driver.call("ModuleGetFunction", ctypes.byref(function), module, name.encode())
        if kernel.shared_bytes > MOST_UNASKED:
            self._driver.call("FuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, kernel.shared_bytes)
        return function

    @cached_property
    def multiprocessors(self) -> int:
        count = ctypes.c_int()
        self._driver.call("DeviceGetAttribute", ctypes.byref(count), _MULTIPROCESSOR_COUNT, self._device)
        return max(count.value, 1)

    def clusters_at_once(self, kernel: Kernel) -> int:
        """How many clusters of a kernel, of one block a processor, run at one time."""
        if kernel.cluster == 1:
            return self.multiprocessors
        if kernel.name not in self._clusters:
            self._clusters[kernel.name] = self._ask_for_clusters(kernel)
        return self._clusters[kernel.name]

    def _ask_for_clusters(self, kernel: Kernel) -> int:
        """The driver's answer, or an estimate: what is wrong, the launch will say."""
        shape = kernel.cluster, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes
        config, count = LaunchConfig(*shape), ctypes.c_int()
        asked = ctypes.byref(count), self._known(kernel), ctypes.byref(config)
        with suppress(DriverError), _Current(self._driver, self._context):
            self._driver.call("OccupancyMaxActiveClusters", *asked)
        return count.value or ceil_div(self.multiprocessors, kernel.cluster)

    def encode(self, matrix: Matrix) -> TensorMap:
        """What the copy engine is told about a matrix, in the driver's own form."""
        memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + MAP_ALIGNMENT)
        offset = -ctypes.addressof(memory) % MAP_ALIGNMENT
        swizzled = matrix.element_bytes == 1
        with _Current(self._driver, self._context):
            self._driver.call(
                "TensorMapEncodeTiled",
                ctypes.byref(memory, offset),
                _UINT8 if swizzled else _FLOAT32,
                2,
                ctypes.c_void_p(matrix.data),
                (ctypes.c_uint64 * 2)(matrix.columns, matrix.rows),
                (ctypes.c_uint64 * 1)(matrix.row_bytes),
                (ctypes.c_uint32 * 2)(matrix.box_columns, matrix.box_rows),
                (ctypes.c_uint32 * 2)(1, 1),
                0,  # CU_TENSOR_MAP_INTERLEAVE_NONE
                _SWIZZLE_128B if swizzled else 0,
                _PROMOTION_256B,
                0,  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: zeros
            )
        return TensorMap.from_buffer_copy(memory, offset)

    def _known(self, kernel: Kernel) -> ctypes.c_void_p:
        if kernel.name not in self._functions:
            raise DriverError(f"{kernel.name} is not for this card")
        return self._functions[kernel.name]

    def launch(self, start: Start) -> None:
        """Queue a kernel on the current stream."""
        kernel, (x, y) = start.kernel, start.grid
        function = self._known(kernel)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(start.params))
        shape = x, y, 1, kernel.threads, 1, 1, kernel.shared_bytes
        stream = ctypes.c_void_p(self._stream())
        with _Current(self._driver, self._context):
            self._driver.call("LaunchKernel", function, *shape, stream, pointers, None)


class _Current:
    """Makes a context the thread's own for a while: a thread that torch has not yet used has none."""

    def __init__(self, driver: Driver, context: ctypes.c_void_p) -> None:
        self._driver, self._context = driver, context

    def __enter__(self) -> None:
        self._driver.call("CtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        self._driver.call("CtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
