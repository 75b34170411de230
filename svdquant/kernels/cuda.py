"""A GPU's kernels, the one way or the other: by a C++ compiler and the CUDA toolkit, or by the NVRTC that torch brings.

The first way makes a library of all of csrc/ (jit.py). The second makes the kernels alone (cubins.py), which Python
starts (driver.py, cuda_ops.py). SVDQUANT_BUILD names one; `auto` takes the second where the first is not to be had.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import cubins, cuda_ops, jit, launches
from .cache import Unavailable
from .driver import Card, Driver, DriverError, open_driver
from .settings import settings

log = logging.getLogger("svdquant-nodes")
_loading = threading.Lock()


@dataclass(frozen=True)
class Found:
    """What came of it: the file that holds a GPU's kernels, or that would, and why it does not."""

    file: Path
    by_nvrtc: bool = False
    missing: str = ""


def load(index: int, capabilities: tuple[tuple[int, int], ...]) -> Found:
    """Make the ops of a GPU part of this process, building them if the cache has none; what fails is logged once.

    capabilities  of all GPUs here that our kernels fit: one library serves them all
    """
    with _loading:
        return _load_once(index, capabilities)


@cache
def _load_once(index: int, capabilities: tuple[tuple[int, int], ...]) -> Found:
    place = jit.library_path(jit.cuda_target(*capabilities))
    if settings().kernels == "off":
        return Found(place, missing="SVDQUANT_KERNELS is off")
    ways, failed = WAYS.get(settings().build, (_no_such_way,)), []
    for way in ways:
        try:
            found = way(index, capabilities)
        except Unavailable as missing:
            failed.append(missing)
            continue
        if failed:
            log.info("SVDQuant: GPU kernels are built without a C++ compiler, by NVRTC: %s", failed[0].reason)
        return found
    reason = "; ".join(missing.reason for missing in failed)
    message = "SVDQuant: no GPU kernels, plain torch runs instead: %s. %s"
    log.warning(message, reason, failed[-1].remedy)
    return Found(place, missing=reason)


def _no_such_way(*_: object) -> Found:
    known = ", ".join(WAYS)
    raise Unavailable(f"SVDQUANT_BUILD is {settings().build!r}", f"Set it to one of {known}, then restart.")


def _by_compiler(_: int, capabilities: tuple[tuple[int, int], ...]) -> Found:
    target = jit.cuda_target(*capabilities)
    missing = _attempt(target)
    if missing is not None:
        raise missing
    return Found(jit.library_path(target))


@cache
def _attempt(target: jit.Target) -> Unavailable | None:
    """Once in a process, however many GPUs ask for the library."""
    try:
        jit.attempt(target)
    except Unavailable as missing:
        return missing
    return None


def _by_nvrtc(index: int, _: tuple[tuple[int, int], ...]) -> Found:
    file = cubins.archive_path(_target(index))
    card(index)
    cuda_ops.register(card)
    return Found(file, by_nvrtc=True)


@cache
def card(index: int) -> Card:
    """A GPU with its kernels loaded; raises Unavailable."""
    target = _target(index)
    made, arch = cubins.load(target), target.number
    try:
        found = Card(_driver(), index, arch)
        found.load(made, launches.kernels(arch))
    except DriverError as error:
        raise Unavailable(
            f"the driver does not take the kernels ({error})", "Update NVIDIA's driver, then restart."
        ) from error
    return found


@cache
def _driver() -> Driver:
    return open_driver()


def _target(index: int) -> cubins.Target:
    properties = torch.cuda.get_device_properties(index)
    return cubins.Target((properties.major, properties.minor))


_Way = Callable[[int, tuple[tuple[int, int], ...]], Found]
WAYS: dict[str, tuple[_Way, ...]] = {
    "auto": (_by_compiler, _by_nvrtc),
    "cpp": (_by_compiler,),
    "nvrtc": (_by_nvrtc,),
}
