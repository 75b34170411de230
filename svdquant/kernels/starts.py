"""A kernel, and one launch of it: what launches.py decides on, cubins.py compiles and driver.py starts.

Kernels are called by their C++ names, of csrc/cuda/*.cuh.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .structs import TensorMap

Scratch = Callable[[int], int]  # bytes -> where they are, on the device, for the length of a call


class Refused(RuntimeError):
    """What a kernel cannot do, in half a sentence."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is started.

    header   in csrc/cuda, without its suffix
    name     in C++, in namespace svdquant::cuda
    threads  of a block; shared_bytes likewise
    cluster  how many blocks are one, by the kernel's own __cluster_dims__
    """

    header: str
    name: str
    threads: int
    shared_bytes: int
    cluster: int = 1


@dataclass(frozen=True)
class Start:
    """One launch."""

    kernel: Kernel
    grid: tuple[int, int]
    params: ctypes.Structure


@dataclass(frozen=True)
class Matrix:
    """A matrix in a GPU's memory as Hopper's copy engine reads it: in boxes, with zeros outside the matrix.

    element_bytes  1, whose boxes of 128 columns are swizzled, or 4
    """

    data: int
    rows: int
    columns: int
    row_bytes: int
    box_rows: int
    box_columns: int
    element_bytes: int = 1


class Place(Protocol):
    """A GPU, as far as launches depend on it; driver.Card is one."""

    arch: int
    multiprocessors: int

    def encode(self, matrix: Matrix) -> TensorMap:
        """What the copy engine is told about a matrix."""

    def clusters_at_once(self, kernel: Kernel) -> int:
        """How many clusters of a kernel run at one time: not all processors have enough others beside them."""


def ceil_div(count: int, each: int) -> int:
    return -(-count // each)


def check_aligned(name: str, address: int | None, multiple: int) -> None:
    """Raises Refused."""
    if (address or 0) % multiple:
        raise Refused(f"{name} must begin at a multiple of {multiple} bytes")
