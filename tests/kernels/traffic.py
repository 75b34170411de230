"""What the emulated card counts while kernels run: wavefronts of shared memory and sectors of global memory.

`Counted` is Kernels that collects a `Line` for every place in a kernel's source that touches memory; tests/kernels/
emulator/traffic.h says how each is counted.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from svdquant_nodes.tests.kernels.emulated import Kernels, library

FIRST = ("codes", "scales", "hidden", "weights", "weight scales")
TENSORS = {  # by the beginning of the function that is called: what it reads, what it writes
    "quantize": (("x", "smooth", "down"), ("codes", "scales", "hidden")),
    "gemm_gelu": (
        (*FIRST, "second scale", "up", "bias", "smooth", "down"),
        ("next codes", "next scales", "next hidden"),
    ),
    "gemm_w8a8": ((*FIRST, "up", "bias", "addend"), ("out",)),
    "gemm_by": ((*FIRST, "second scale", "up", "bias", "addend"), ("out",)),
    "gemv": (("x", "weights", "weight scales", "zeros", "bias", "addend"), ("out",)),
}
SHARED = -1  # the emulator's number of what is no tensor


@dataclass(frozen=True)
class Line:
    """Requests of whole warps that one line of a kernel made of `where`: a tensor, shared memory or scratch memory.

    moved and least are wavefronts of shared memory, or sectors of global memory: what it took, and the fewest that such
    requests can take. uneven: lanes did not pass as often as each other, so requests may be mismatched.
    """

    function: str
    line: int
    kind: str
    where: str
    bytes: int
    requests: int
    lanes: int
    moved: int
    least: int
    uneven: bool

    @property
    def name(self) -> str:
        return f"{self.function}: {self.kind} {self.where}"


@dataclass(frozen=True)
class Counted(Kernels):
    """The kernels of one card, of which every call's accesses are counted into `lines`."""

    lines: list[Line] = field(default_factory=list)

    def _call(
        self, name: str, *args: object, read: tuple[Tensor | None, ...], written: tuple[Tensor, ...]
    ) -> None:
        names = next(both for begin, both in TENSORS.items() if name.startswith(begin))
        given = [
            (place, tensor)
            for places, tensors in zip(names, (read, written), strict=True)
            for place, tensor in zip(places, tensors, strict=True)
        ]
        kernels = library(self.arch)
        kernels.count_traffic(True)
        try:
            super()._call(name, *args, read=read, written=written)
            self.lines.extend(report(kernels, [place for place, t in given if t is not None and t.numel()]))
        finally:
            kernels.count_traffic(False)


def report(kernels: ctypes.CDLL, places: list[str]) -> list[Line]:
    """What was counted since counting began; `places` names the tensors that were handed over, in order."""
    kernels.counted_traffic.restype = ctypes.c_char_p
    return [_line(line, places) for line in kernels.counted_traffic().decode().splitlines()]


def _line(text: str, places: list[str]) -> Line:
    """Of the emulator's words: function, which may hold any, line, kind, tensor, five numbers, uneven."""
    function, line, kind, tensor, *numbers, uneven = text.rsplit(" ", 9)
    place = int(tensor)
    where = "shared" if place == SHARED else places[place] if place < len(places) else "scratch"
    return Line(function.partition("<")[0], int(line), kind, where, *map(int, numbers), uneven == "1")


def excess(lines: Iterable[Line]) -> dict[str, float]:
    """By the name of a line: how many times the least it takes, where that is more."""
    moved, least = defaultdict(int), defaultdict(int)
    for line in lines:
        moved[line.name] += line.moved
        least[line.name] += line.least
    return {name: moved[name] / least[name] for name in moved if moved[name] != least[name]}
