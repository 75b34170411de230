"""Kernels by NVRTC: where it is found, what is kept, and what a user reads when it cannot do it. Needs no NVRTC."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svdquant_nodes.svdquant.kernels import cubins
from svdquant_nodes.svdquant.kernels.settings import settings

ADA = cubins.Target((8, 9))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A torch for CUDA 13 in a folder of its own, and no toolkit."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(cubins, "cuda_home", lambda: None)
    return tmp_path


def placed(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"library")
    return file


PLACES = {
    "packages-of-cuda-13": "nvidia/cu13/lib/libnvrtc.so.13",
    "packages-of-cuda-12": "nvidia/cuda_nvrtc/lib/libnvrtc.so.13",
    "beside-torch": "torch/lib/libnvrtc.so.13",
    "beside-torch-renamed": "torch/lib/libnvrtc-0a1b2c3d.so.13",
    "beside-torch-on-windows": "torch/lib/nvrtc64_130_0.dll",
    "packages-on-windows": "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_nvrtc_is_found(machine, place):
    assert cubins.library() is None
    for other in (
        "libnvrtc-builtins.so.13.0",
        "libnvrtc.alt.so.13",
        "nvrtc64_130_0.alt.dll",
        "libnvrtc.so.12",
    ):
        placed((machine / place).with_name(other))
    assert cubins.library() is None
    file = placed(machine / place)
    assert cubins.library() == file


def test_nvrtc_of_a_toolkit_is_the_last(machine, monkeypatch):
    monkeypatch.setattr(cubins, "cuda_home", lambda: machine / "cuda")
    toolkits = placed(machine / "cuda" / "lib64" / "libnvrtc.so.13")
    assert cubins.library() == toolkits
    beside = placed(machine / PLACES["beside-torch"])
    assert cubins.library() == beside


def test_a_torch_without_cuda_has_none(machine, monkeypatch):
    placed(machine / PLACES["beside-torch"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cubins.library() is None


def test_no_nvrtc_is_said(machine):
    with pytest.raises(cubins.Unavailable, match="no NVRTC for CUDA 13.0 beside torch") as caught:
        cubins.archive_path(ADA)
    assert "nvidia-cuda-nvrtc" in caught.value.remedy


# ---- what is made and kept ----


@pytest.fixture
def made(machine, monkeypatch):
    """NVRTC that makes cubins of two bytes; returns the units it was asked for."""
    placed(machine / PLACES["beside-torch"])
    monkeypatch.setattr(cubins, "settings", lambda: replace(settings(), cache=machine / "cache"))
    asked = []

    def compile_(unit, arch, nvrtc, output):
        asked.append((unit, arch))
        output.write_bytes(b"\x7fE")
        return {name: f"_Z{name}" for name in unit.names}

    monkeypatch.setattr(cubins, "_compile", compile_)
    cubins.load.cache_clear()
    yield asked
    cubins.load.cache_clear()


def test_a_cards_kernels_are_one_file(made, machine):
    found = cubins.load(ADA)
    assert sorted(made, key=str) == sorted(((unit, "89") for unit in ADA.units), key=str)
    assert [set(cubin.kernels) for cubin in found] == [set(unit.names) for unit in ADA.units]
    assert all(cubin.code == b"\x7fE" for cubin in found)
    file = cubins.archive_path(ADA)
    assert [kept.name for kept in (machine / "cache").iterdir()] == [file.name]
    assert file.name.startswith("svdquant-nvrtc-sm_89-") and file.suffix == ".zip"


def test_a_second_start_compiles_nothing(made):
    first = cubins.load(ADA)
    cubins.load.cache_clear()
    made.clear()
    assert cubins.load(ADA) == first and made == []


def test_a_spoilt_file_is_removed_and_said(made, machine):
    (machine / "cache").mkdir()
    cubins.archive_path(ADA).write_bytes(b"no archive")
    with pytest.raises(cubins.Unavailable, match="cannot be read") as caught:
        cubins.load(ADA)
    assert caught.value.remedy == "It was removed, and will be made anew at the next start."
    assert list((machine / "cache").iterdir()) == []


def test_key_follows_sources_card_and_compiler(machine, monkeypatch):
    nvrtc = placed(machine / PLACES["beside-torch"])
    keys = {cubins.key(ADA, nvrtc), cubins.key(cubins.Target((8, 6)), nvrtc)}
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    keys.add(cubins.key(ADA, nvrtc))
    there = cubins.headers()
    monkeypatch.setattr(cubins, "headers", lambda: {**there, "ptx.cuh": "// another"})
    keys.add(cubins.key(ADA, nvrtc))
    nvrtc.write_bytes(b"another library")
    keys.add(cubins.key(ADA, nvrtc))
    assert len(keys) == 5


def test_other_kernels_are_another_archive(machine, monkeypatch):
    """One that a header has already, or only another instance of it."""
    nvrtc = placed(machine / PLACES["beside-torch"])
    before, there = cubins.key(ADA, nvrtc), cubins.units(ADA.number)
    monkeypatch.setattr(cubins, "units", lambda arch: there[:-1])
    assert cubins.key(ADA, nvrtc) != before


ARCHS = {
    (7, 5): "75",
    (8, 9): "89",
    (9, 0): "90a",
    (12, 0): "120a",
}  # wgmma and block scales are of "a" alone


@pytest.mark.parametrize(("capability", "arch"), ARCHS.items(), ids=ARCHS.values())
def test_a_card_as_the_compiler_calls_it(capability, arch):
    target = cubins.Target(capability)
    assert target.arch == arch and target.number == int(arch.rstrip("a"))


def test_headers_are_all_that_a_unit_includes():
    there = cubins.headers()
    for unit in (*cubins.units(90), *cubins.units(120)):
        wanted, seen = {f"{unit.header}.cuh"}, set()
        while wanted:
            name = wanted.pop()
            assert name in there, f"{unit.header} includes {name}, which NVRTC is not given"
            seen.add(name)
            lines = [line.split() for line in there[name].splitlines() if line.startswith("#include")]
            wanted |= {line[1].strip('"<>') for line in lines} - seen - {"emulated.h", "hopper_emulated.h"}


# ---- the compiler's process ----

UNIT = cubins.Unit("gemv_awq", ("gemv_awq_kernel<1>",))


def answer(monkeypatch, **said):
    """NVRTC's process ends with this."""
    done = {"version": "12.6", "problem": "", "words": "", "kernels": {}, **said}
    ended = SimpleNamespace(returncode=0, stdout=json.dumps(done), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)


FAILURES = {
    "older-than-the-card": (
        dict(
            problem="nvrtcCompileProgram: 5",
            words="nvrtc: error: invalid value for --gpu-architecture (-arch)",
        ),
        "NVRTC 12.6 does not know sm_120a",
    ),
    "an-error-in-a-source": (
        dict(problem="nvrtcCompileProgram: 6", words='ptx.cuh(3): error: expected a ";"\n1 error detected'),
        r'NVRTC failed \(ptx.cuh\(3\): error: expected a ";"\)',
    ),
    "without-a-word": (
        dict(problem="libnvrtc.so.12: no such file"),
        "NVRTC failed .libnvrtc.so.12: no such file",
    ),
}


@pytest.mark.parametrize(("said", "message"), FAILURES.values(), ids=FAILURES)
def test_what_nvrtc_says_is_one_sentence(monkeypatch, tmp_path, said, message):
    answer(monkeypatch, **said)
    with pytest.raises(cubins.Unavailable, match=message):
        cubins._compile(UNIT, "120a", tmp_path, tmp_path / "0.cubin")


def test_a_process_that_crashes_is_one_sentence(monkeypatch, tmp_path):
    ended = SimpleNamespace(returncode=-11, stdout="", stderr="first\nSegmentation fault\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(cubins.Unavailable, match="NVRTC's process ended with code -11: Segmentation fault"):
        cubins._compile(UNIT, "86", tmp_path, tmp_path / "0.cubin")


def test_a_process_that_hangs_is_one_sentence(monkeypatch, tmp_path):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(cubins.Unavailable, match="NVRTC did not end within 300 s"):
        cubins._compile(UNIT, "86", tmp_path, tmp_path / "0.cubin")


def test_a_library_that_is_none_is_one_sentence(tmp_path):
    """The real process, which imports nothing but Python's own."""
    with pytest.raises(cubins.Unavailable, match=r"NVRTC failed .*libnvrtc.so.13"):
        cubins._compile(UNIT, "86", placed(tmp_path / "libnvrtc.so.13"), tmp_path / "0.cubin")
    code = "import sys; sys.argv.pop(0); exec(open(sys.argv[0]).read().split('if __name__')[0]); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", code, cubins.PROGRAM], capture_output=True, text=True
    )
    assert "json" in loaded.stdout and "torch" not in loaded.stdout.split()
