"""csrc/cuda's kernels compiled by NVRTC, for machines without a C++ compiler or CUDA toolkit; kept as cache.py says.

torch's CUDA wheels bring NVRTC, which makes machine code of CUDA C++ by itself. It gets the headers alone, where the
kernels are; what starts them is launches.py instead of the .cu files. A card's kernels are one file of the cache, an
archive of cubins with a list of names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import torch

from . import launches
from .cache import Unavailable, make
from .jit import CSRC, cuda_home
from .settings import settings

log = logging.getLogger("svdquant-nodes")

PROGRAM = Path(__file__).with_name("nvrtc.py")
OPTIONS = ("-std=c++17", "-default-device")  # the latter: functions without a word are the device's
KERNELS_AT_ONCE = 3  # of one header, in one call of the compiler, of which several run side by side
COMPILE_SECONDS = 300
LIST = "kernels.json"


@dataclass(frozen=True)
class Unit:
    """What one call of the compiler makes: kernels of one header."""

    header: str
    names: tuple[str, ...]

    @property
    def source(self) -> str:
        spaces = "using namespace svdquant;\nusing namespace svdquant::cuda;\n"
        return f'#include "{self.header}.cuh"\n{spaces}'


def units(arch: int) -> list[Unit]:
    """All kernels of a card of compute capability arch / 10."""
    found = []
    ordered = sorted(launches.kernels(arch), key=lambda kernel: kernel.header)
    for header, kernels in groupby(ordered, key=lambda kernel: kernel.header):
        names = [kernel.name for kernel in kernels]
        found += [
            Unit(header, tuple(names[i : i + KERNELS_AT_ONCE])) for i in range(0, len(names), KERNELS_AT_ONCE)
        ]
    return found


def headers() -> dict[str, str]:
    """Everything a unit may include, under the name by which it is included."""
    kernels = {file.name: file for file in sorted((CSRC / "cuda").glob("*.cuh"))}
    standard = {file.name: file for file in sorted((CSRC / "cuda" / "nvrtc").iterdir())}
    files = {"../launch.h": CSRC / "launch.h", **kernels, **standard}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


# ---- the compiler ----


def library() -> Path | None:
    """NVRTC of torch's own CUDA version: beside torch, in PyPI's CUDA packages, or in the CUDA toolkit."""
    return next(iter(_libraries()), None)


def _libraries() -> Iterator[Path]:
    major = (torch.version.cuda or "").split(".")[0]
    name = re.compile(rf"(libnvrtc(-[0-9a-f]+)?\.so\.{major}(\.[0-9.]+)?|nvrtc64_{major}\d_0\.dll)")
    beside, home = Path(torch.__file__).parent / "lib", cuda_home()
    packages = Path(torch.__file__).parents[1] / "nvidia"
    folders = [beside]
    folders += [packages / inner for inner in (f"cu{major}/lib", f"cu{major}/bin/x86_64", f"cu{major}/bin")]
    folders += [packages / "cuda_nvrtc" / inner for inner in ("lib", "bin")]
    folders += [home / inner for inner in ("lib64", "bin/x64", "bin")] if home else []
    for folder in folders if major else []:
        if folder.is_dir():
            yield from sorted(file for file in folder.iterdir() if name.fullmatch(file.name))


def library_or_say() -> Path:
    found = library()
    if found is None:
        raise Unavailable(
            f"no NVRTC for CUDA {torch.version.cuda} beside torch, among Python's packages or in a CUDA toolkit",
            f"Install torch for CUDA anew, or nvidia-cuda-nvrtc of version {torch.version.cuda}, then restart.",
        )
    return found


def _compile(unit: Unit, arch: str, nvrtc: Path, output: Path) -> dict[str, str]:
    """A unit's cubin into a file; returns C++ name -> name in the cubin."""
    order = dict(
        library=str(nvrtc),
        source=unit.source,
        headers=headers(),
        names=unit.names,
        options=[*OPTIONS, f"-arch=sm_{arch}"],
        output=str(output),
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(PROGRAM)],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"NVRTC did not end within {COMPILE_SECONDS} s", _REPORT) from error
    except OSError as error:
        raise Unavailable(f"{sys.executable} does not start ({error})", _REPORT) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise Unavailable(f"NVRTC's process ended with code {done.returncode}: {last[:300]}", _REPORT)
    answer = json.loads(done.stdout)
    if settings().verbose and answer["words"]:
        log.info("SVDQuant: NVRTC on %s: %s", unit.header, answer["words"])
    if answer["problem"]:
        raise _failure(answer, arch)
    return answer["kernels"]


_REPORT = "Please report this line."


def _failure(answer: dict[str, str], arch: str) -> Unavailable:
    if "gpu-architecture" in answer["words"]:
        return Unavailable(
            f"NVRTC {answer['version']} does not know sm_{arch}",
            "Install a torch whose CUDA version is as new as the GPU, then restart.",
        )
    telling = [line.strip() for line in answer["words"].splitlines() if "error" in line]
    return Unavailable(f"NVRTC failed ({(telling or [answer['problem']])[0][:300]})", _REPORT)


# ---- the cache ----


@dataclass(frozen=True)
class Target:
    """The kernels of one card; arch as nvcc numbers it: "86", "90a"."""

    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        major, minor = self.capability
        return f"{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def name(self) -> str:
        return f"nvrtc-sm_{self.arch}"

    @property
    def number(self) -> int:
        major, minor = self.capability
        return 10 * major + minor

    @property
    def units(self) -> list[Unit]:
        return units(self.number)


def key(target: Target, nvrtc: Path) -> str:
    """16 hex digits of everything that decides what the compiler makes."""
    made_of = target, target.units, headers(), OPTIONS, torch.version.cuda, nvrtc.name, nvrtc.stat().st_size
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


def archive_path(target: Target) -> Path:
    """Where a card's kernels are, or would be; raises Unavailable."""
    return settings().cache / f"svdquant-{target.name}-{key(target, library_or_say())}.zip"


@dataclass(frozen=True)
class Cubin:
    """Machine code, and C++ name -> name in it."""

    code: bytes
    kernels: dict[str, str]


@cache
def load(target: Target) -> tuple[Cubin, ...]:
    """A card's kernels, compiled if the cache has none; raises Unavailable."""
    path = archive_path(target)
    if not path.is_file():
        make(path, target.name, lambda folder: _build(target, folder))
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        raise Unavailable(
            f"{path} cannot be read ({error})", "It was removed, and will be made anew at the next start."
        ) from error


def _build(target: Target, folder: Path) -> Path:
    """All units, side by side, into an archive; returns it."""
    nvrtc, ordered = library_or_say(), target.units
    files = [folder / f"{i}.cubin" for i in range(len(ordered))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda unit, file: _compile(unit, target.arch, nvrtc, file), ordered, files))
    return _write(folder / "kernels.zip", files, made)


def _write(archive: Path, files: Sequence[Path], names: Sequence[dict[str, str]]) -> Path:
    with zipfile.ZipFile(archive, "w") as into:
        for file in files:
            into.write(file, file.name)
        into.writestr(LIST, json.dumps({file.name: found for file, found in zip(files, names, strict=True)}))
    return archive


def _read(archive: Path) -> tuple[Cubin, ...]:
    with zipfile.ZipFile(archive) as kept:
        return tuple(Cubin(kept.read(file), names) for file, names in json.loads(kept.read(LIST)).items())
