"""Python starts the kernels that C++ starts: the same ones, on the same grids, with the same parameters.

csrc/ops.cpp and the host side of csrc/cuda/*.cu run on an emulated card that records (recorder.py), so the second copy
of their choices, svdquant/kernels/launches.py, cannot differ from the first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from svdquant_nodes.svdquant.kernels import launches, structs
from svdquant_nodes.tests.kernels import launch_cases
from svdquant_nodes.tests.kernels.emulated import COMPILER, CUDA, EMULATOR, KEPT, built, library

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the C++ side cannot be recorded")

RECORDER = Path(__file__).with_name("recorder.py")
CARDS = (75, 90, 120)  # without bf16 and with 4-bit products; Hopper; with bf16 and 4-bit floats


def ops_library(arch: int, emulator: Path) -> Path:
    """csrc/ops.cpp as it is for GPUs, over an emulated card and CPU tensors."""
    source, torch_at = CUDA.parent / "ops.cpp", Path(torch.__file__).parent
    made_of = [source.read_text(), emulator.name, torch.__version__]
    made_of += [stub.read_text() for stub in sorted((EMULATOR / "c10" / "cuda").iterdir())]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    path = KEPT / f"ops{arch}-{digest[:16]}.so"
    with FileLock(KEPT / f"ops{arch}.lock"):
        if not path.exists():
            for older in KEPT.glob(f"ops{arch}-*.so"):
                older.unlink()
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fopenmp", "-DSVDQUANT_DEVICE=CPU"]
            flags += ["-DSVDQUANT_GPU", f"-I{EMULATOR}"]
            torchs = [f"-I{torch_at}/include", f"-L{torch_at}/lib", "-ltorch_cpu", "-lc10"]
            command = [COMPILER, *flags, source, emulator, *torchs, "-o", path]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(done.stderr[:3000], pytrace=False)
    return path


@functools.cache
def recorded(arch: int) -> dict[str, dict] | str:
    """What the recorder said, or why it could not."""
    emulator = built(arch)
    if isinstance(emulator, str):
        return emulator
    command = [sys.executable, RECORDER, emulator, ops_library(arch, emulator), str(arch)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


CASES = [
    pytest.param(case, arch, id=f"{case}-sm{arch}") for arch in CARDS for case in launch_cases.cases(arch)
]


@pytest.mark.parametrize(("case", "arch"), CASES)
def test_python_launches_what_the_cpp_does(case, arch):
    said = recorded(arch)[case]
    assert said["python"] == said["cpp"]
    assert said["results"][0] == said["results"][1]


@pytest.mark.parametrize("arch", CARDS, ids="sm{}".format)
def test_the_cases_start_every_kernel(arch):
    every = [launch for said in recorded(arch).values() for launch in said["cpp"]]
    started = {launch[0] for launch in every if isinstance(launch, list)}
    assert started == {kernel.name for kernel in launches.kernels(arch)}


def test_layout_of_parameters():
    """Every field of every struct: its place and its size."""
    layout = library(90).layout
    layout.restype = ctypes.c_char_p
    there = [line.split() for line in layout().decode().splitlines()]
    here = []
    for name in dict.fromkeys(line[0] for line in there):
        struct = getattr(structs, name)
        for field in (field for field, _ in struct._fields_ if field != "_gap"):
            place = getattr(struct, field)
            here.append([name, field, str(place.offset), str(place.size)])
    assert here == there
