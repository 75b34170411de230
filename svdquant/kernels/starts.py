"""A kernel, and one launch of it: what launches.py decides on, cubins.py compiles and driver.py starts.

Kernels are called by their C++ names, of csrc/cuda/*.cuh.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

Scratch = Callable[[int], int]  # bytes -> where they are, on the device, for the length of a call


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


def ceil_div(count: int, each: int) -> int:
    return -(-count // each)


def check_aligned(name: str, address: int | None, multiple: int) -> None:
    """Raises Refused."""
    if (address or 0) % multiple:
        raise Refused(f"{name} must begin at a multiple of {multiple} bytes")
