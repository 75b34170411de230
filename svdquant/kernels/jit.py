"""Build csrc/ on first need and load it: torch's own compiler driver, and the folder of cache.py.

The compiler runs in a Python of its own, where the environment that torch wants (PATH, CUDA_HOME, job count) can be
set without touching ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import msvc
from .cache import Unavailable, make
from .settings import settings

log = logging.getLogger("svdquant-nodes")

CSRC = Path(__file__).resolve().parents[2] / "csrc"
WINDOWS, LINUX = sys.platform == "win32", sys.platform.startswith("linux")
NVCC, USUAL_CUDA_HOME = "nvcc.exe" if WINDOWS else "nvcc", "/usr/local/cuda"
BUILD_SECONDS = 900  # a build takes half a minute; a compiler that hangs must not hang the host
JOB_BYTES = 2**30  # the file that includes torch needs 0.6 GB

_BUILD = "import json, sys; from torch.utils.cpp_extension import load; load(**json.load(sys.stdin))"
_SEE_OUTPUT = "Start again with SVDQUANT_VERBOSE=1 to see the compiler's output."
_loading = threading.Lock()


# ---- what to build ----


@dataclass(frozen=True)
class Target:
    """One library: csrc/ops.cpp with the kernels of one folder beside it.

    name     "cpu" | "cuda-sm_90a" | "cuda-sm_86-sm_120a"
    folder   of its kernels, in csrc/
    flags    of the C++ compiler
    archs    of the GPUs it is for, as nvcc numbers them: "86", "90a"; none without CUDA
    """

    name: str
    folder: str
    flags: tuple[str, ...]
    archs: tuple[str, ...] = ()

    @property
    def sources(self) -> list[Path]:
        kernels = (CSRC / self.folder).iterdir()
        return [CSRC / "ops.cpp", *sorted(file for file in kernels if file.suffix in {".cpp", ".cu"})]

    @property
    def files(self) -> list[Path]:
        """The sources and every header that they may include."""
        folders = (CSRC, CSRC / self.folder)
        headers = [file for folder in folders for file in folder.iterdir() if file.suffix in {".h", ".cuh"}]
        return self.sources + sorted(headers)


def cpu_target() -> Target:
    return Target("cpu", "cpu", _flags("CPU"))


def cuda_target(*capabilities: tuple[int, int]) -> Target:
    """One library for all GPUs of the machine, since all register with torch's one name for them, CUDA.

    From 9.0 on it has the instructions that only that architecture has.
    """
    archs = tuple(f"{a}{b}{'a' if a >= 9 else ''}" for a, b in sorted(set(capabilities)))
    name = "-".join(["cuda", *(f"sm_{arch}" for arch in archs)])
    return Target(name, "cuda", (*_flags("CUDA"), "/DSVDQUANT_GPU" if WINDOWS else "-DSVDQUANT_GPU"), archs)


def _flags(device: str) -> tuple[str, ...]:
    """Strict floats, as contracted multiply-adds would change codes; sums as written, as regrouped ones spill."""
    if WINDOWS:
        return (f"/DSVDQUANT_DEVICE={device}", "/O2", "/openmp", "/fp:precise")
    exact = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-tree-reassoc")
    # for at::parallel_for; its symbols are those of the OpenMP that torch has loaded, so none is linked
    threads = ("-fopenmp",) if LINUX else ()
    return (f"-DSVDQUANT_DEVICE={device}", *exact, *threads, "-fvisibility=hidden")


def key(target: Target) -> str:
    """16 hex digits of everything that decides what the compiler makes."""
    digest = hashlib.sha256()
    for file in target.files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(CSRC).as_posix()} {len(content)}\n".encode() + content)
    made_for = (target, torch.__version__, torch.version.cuda, sys.platform, platform.machine())
    digest.update(repr(made_for).encode())
    return digest.hexdigest()[:16]


def library_path(target: Target) -> Path:
    return settings().cache / f"svdquant-{target.name}-{key(target)}{'.dll' if WINDOWS else '.so'}"


# ---- load, building if need be ----


def load(target: Target) -> str | None:
    """Make a target's ops part of this process, building them if the cache has none.

    returns  None, or the reason why its ops are not there, which was logged once with its remedy

    A second call answers as the first did: nothing is tried twice in a process.
    """
    with _loading:
        return _load_once(target)


@cache
def _load_once(target: Target) -> str | None:
    if settings().kernels == "off":
        return "SVDQUANT_KERNELS is off"
    try:
        attempt(target)
    except Unavailable as missing:
        message = "SVDQuant: no %s kernels, the slower reference ops run instead: %s. %s"
        log.warning(message, target.name, missing.reason, missing.remedy)
        return missing.reason
    return None


def attempt(target: Target) -> None:
    """The same where somebody else has the word; raises Unavailable."""
    path = library_path(target)
    if not path.is_file():
        environment = _environment(target)
        make(path, target.name, lambda folder: _compile(target, folder, environment))
    _open(path)


def _open(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        raise Unavailable(
            f"{path} does not load ({_last_line(str(error))})",
            "It was removed, and will be built anew at the next start.",
        ) from error


# ---- the compiler ----


def _compile(target: Target, folder: Path, environment: dict[str, str]) -> Path:
    """Run torch's compiler driver in a Python of its own; returns the library inside `folder`."""
    known = _known_archs(target, environment) if target.archs else []
    order = dict(
        name="svdquant",
        sources=[str(file) for file in target.sources],
        extra_cflags=target.flags,
        extra_cuda_cflags=[f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known],
        extra_ldflags=_runtime(Path(environment["CUDA_HOME"]), folder) if known else [],
        build_directory=str(folder),
        is_python_module=False,
        verbose=settings().verbose,
    )
    pipe = {} if settings().verbose else dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _BUILD],
            input=json.dumps(order),
            env=environment,
            cwd=folder,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
            **pipe,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the compiler did not end within {BUILD_SECONDS} s", _SEE_OUTPUT) from error
    libraries = [file for file in folder.glob("svdquant.*") if file.suffix in {".so", ".pyd", ".dll"}]
    if done.returncode or not libraries:
        raise _failure(done.stdout or "")
    return libraries[0]


def _runtime(home: Path, folder: Path) -> list[str]:
    """What lets the linker find CUDA's runtime library: in PyPI's packages it has its full name alone."""
    places = [home / "lib64", home / "lib"]
    if WINDOWS or any((place / "libcudart.so").exists() for place in places):
        return []
    for file in (file for place in places for file in place.glob("libcudart.so.*")):
        (folder / "libcudart.so").symlink_to(file)
        return [f"-L{folder}"]
    return []


def _failure(output: str) -> Unavailable:
    """A failed build in the line of its output that says most."""
    if "No space left" in output:
        return Unavailable(
            "the disk is full", "Make room or set SVDQUANT_CACHE_DIR to another disk, then restart."
        )
    telling = [line.strip() for line in output.splitlines() if re.search(r"\berror\b.*:", line)]
    reason = telling[0] if telling else _last_line(output)
    return Unavailable(f"the compiler failed ({reason[:300]})", _SEE_OUTPUT)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it gave no reason"


def _environment(target: Target) -> dict[str, str]:
    """Ours, with what torch's compiler driver needs to find."""
    environment = dict(os.environ)
    scripts = sysconfig.get_path("scripts")  # where pip puts ninja, whether or not the venv is active
    environment["PATH"] = os.pathsep.join(filter(None, [environment.get("PATH"), scripts]))
    environment.setdefault("MAX_JOBS", str(_jobs()))
    environment.setdefault("CXX", _compiler(environment["PATH"]))
    if WINDOWS and not shutil.which(environment["CXX"], path=environment["PATH"]):
        environment = msvc.variables(environment)
    if target.archs:
        environment["CUDA_HOME"] = str(_cuda_home_or_say())
    _check_tools(environment)
    return environment


def _compiler(path: str) -> str:
    """torch's default, but g++ before c++ on Linux: clang's OpenMP is not the one that torch has loaded."""
    if WINDOWS:
        return "cl"
    return "g++" if LINUX and shutil.which("g++", path=path) else "c++"


def _check_tools(environment: dict[str, str]) -> None:
    compiler, path = environment["CXX"], environment["PATH"]
    if not shutil.which(compiler.split()[0], path=path):
        remedy = (
            "Install one (Debian and Ubuntu: apt install g++; macOS: xcode-select --install), then restart."
        )
        if WINDOWS:
            remedy = "Install Visual Studio's build tools with C++ for the desktop, then restart."
        raise Unavailable(f"no C++ compiler named {compiler} was found", remedy)
    if not shutil.which("ninja", path=path):
        raise Unavailable("ninja was not found", f"Run {sys.executable} -m pip install ninja, then restart.")


def _jobs() -> int:
    """Compilers at once: as many as there are cores and free memory for."""
    cores = os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return cores
    return max(1, min(cores, free // JOB_BYTES))


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, where the nvcc on the PATH is, the usual place, or PyPI's CUDA packages."""
    on_path, site = shutil.which(NVCC), Path(sysconfig.get_path("purelib")) / "nvidia"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [Path(on_path).resolve().parents[1]] if on_path else []
    homes += [USUAL_CUDA_HOME, *sorted(site.glob("cu[0-9]*"), reverse=True)]
    return next((Path(home) for home in homes if home and _is_toolkit(Path(home))), None)


def _is_toolkit(home: Path) -> bool:
    """With headers beside the compiler: an nvcc on the PATH may be a script that calls another."""
    return (home / "bin" / NVCC).is_file() and (home / "include" / "cuda_runtime.h").is_file()


def _cuda_home_or_say() -> Path:
    home = cuda_home()
    if home is None:
        raise Unavailable(
            "no CUDA toolkit in CUDA_HOME, around the nvcc on the PATH, in /usr/local/cuda or among Python's packages",
            f"Install CUDA {torch.version.cuda} (nvcc and its headers), then restart.",
        )
    return home


def _known_archs(target: Target, environment: dict[str, str]) -> list[str]:
    """The architectures of a target that this nvcc can compile for; of several GPUs, an unknown one is left out."""
    nvcc = Path(environment["CUDA_HOME"], "bin", NVCC)
    try:
        asked = subprocess.run(
            [nvcc, "--list-gpu-code"], env=environment, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(
            f"{nvcc} does not run ({error})", "Install the CUDA toolkit anew, then restart."
        ) from error
    known = [arch for arch in target.archs if f"sm_{arch.rstrip('a')}" in asked.stdout.split()]
    if not known:
        raise Unavailable(
            f"{nvcc} does not know {', '.join(f'sm_{arch}' for arch in target.archs)}",
            "Install a CUDA toolkit as new as the GPU, then restart.",
        )
    return known
