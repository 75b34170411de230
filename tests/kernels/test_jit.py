"""The build, on sources of two lines: what is cached, what is rebuilt, and what a user reads when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from svdquant_nodes.svdquant.kernels import cache as kept
from svdquant_nodes.svdquant.kernels import jit
from svdquant_nodes.tools.pack import ROOT

BUILDER = ROOT / "tests" / "kernels" / "builder.py"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def csrc(tmp_path):
    """Sources that compile in a second: one file of the library's, one kernel's, one header of each."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cuda").mkdir()
    (folder / "launch.h").write_text("#define ANSWER 42\n")
    (folder / "cpu" / "kernel.h").write_text("int kernel();\n")
    (folder / "cpu" / "kernel.cpp").write_text('#include "kernel.h"\nint kernel() { return 1; }\n')
    (folder / "ops.cpp").write_text(
        '#include "launch.h"\n#include "cpu/kernel.h"\nint f() { return ANSWER + kernel(); }\n'
    )
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def environment(cache, **changes):
    return {**os.environ, "SVDQUANT_CACHE_DIR": str(cache), "SVDQUANT_KERNELS": "auto", **changes}


def start(csrc, cache, **changes):
    command = [sys.executable, str(BUILDER), str(csrc)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen(command, env=environment(cache, **changes), **pipes)


def finish(process):
    """What the builder printed, and the warnings it logged."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), [line for line in err.splitlines() if line.startswith("WARNING")]


def build(csrc, cache, **changes):
    return finish(start(csrc, cache, **changes))


def names(cache):
    return sorted(file.name for file in cache.iterdir()) if cache.is_dir() else []


def script(folder, text):
    """An executable to stand where a compiler should; asked who it is, it lets g++ answer."""
    file = folder / "compiler"
    file.write_text(f'#!/bin/sh\ncase "$1" in -v|--version|-dump*) exec g++ "$@";; esac\n{text}\n')
    file.chmod(0o755)
    return str(file)


# ---- the cache ----


@needs_compiler
def test_second_process_finds_the_first_ones_library(csrc, cache):
    first, warnings = build(csrc, cache)
    assert first["missing"] is None and warnings == []
    assert names(cache) == [Path(first["path"]).name]
    stamp = Path(first["path"]).stat().st_mtime_ns
    second, _ = build(csrc, cache, CXX="no-compiler-needed")
    assert second["missing"] is None and second["path"] == first["path"]
    assert Path(first["path"]).stat().st_mtime_ns == stamp
    assert second["seconds"] < first["seconds"] / 5


@needs_compiler
def test_an_edited_header_is_a_new_library(csrc, cache):
    build(csrc, cache)
    (csrc / "cpu" / "kernel.h").write_text("int kernel();  // edited\n")
    second, _ = build(csrc, cache)
    assert second["missing"] is None and len(names(cache)) == 2


@needs_compiler
def test_a_killed_build_leaves_nothing_in_the_way(csrc, cache):
    slow = script(csrc.parent, "sleep 100")
    killed = start(csrc, cache, CXX=slow)
    deadline = time.monotonic() + 100
    while not list(cache.glob("build-*/build.ninja")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again, _ = build(csrc, cache)
    assert again["missing"] is None
    left = list(cache.glob("build-*"))
    assert len(left) == 1  # not a day old: it may be another process's
    two_days_ago = time.time() - 2 * kept.DAY_SECONDS
    os.utime(left[0], (two_days_ago, two_days_ago))
    (csrc / "launch.h").write_text("#define ANSWER 43\n")
    build(csrc, cache)
    assert not list(cache.glob("build-*"))


@needs_compiler
def test_two_builds_at_once_leave_one_library(csrc, cache):
    both = [start(csrc, cache), start(csrc, cache)]
    results = [finish(process) for process in both]
    assert all(said["missing"] is None and warnings == [] for said, warnings in results)
    assert names(cache) == [Path(results[0][0]["path"]).name]


def test_a_spoilt_library_is_removed_and_said(csrc, cache):
    said, _ = build(csrc, cache, SVDQUANT_KERNELS="off")
    cache.mkdir()
    Path(said["path"]).write_bytes(b"not a library")
    said, warnings = build(csrc, cache)
    assert "does not load" in said["missing"] and names(cache) == []
    assert "It was removed, and will be built anew at the next start." in warnings[0]


# ---- when it cannot be built: one sentence with the remedy, and the reference ops ----


def full_disk(folder):
    return script(folder, 'echo "fatal error: cannot write x.o: No space left on device" >&2; exit 1')


def wrong_source(folder):
    return script(folder, 'echo "kernel.cpp:3:1: error: no such thing" >&2; exit 1')


FAILURES = {  # environment for a folder, reason, remedy
    "no-compiler": (lambda f: {"PATH": ""}, "no C++ compiler named c++ was found", "apt install g++"),
    "no-such-compiler": (
        lambda f: {"CXX": "abacus"},
        "no C++ compiler named abacus was found",
        "apt install g++",
    ),
    "compiler-that-fails": (
        lambda f: {"CXX": script(f, "exit 1")},
        "the compiler failed",
        "SVDQUANT_VERBOSE=1",
    ),
    "compiler-that-complains": (
        lambda f: {"CXX": wrong_source(f)},
        "the compiler failed (kernel.cpp:3:1: error: no such thing)",
        "SVDQUANT_VERBOSE=1",
    ),
    "full-disk": (lambda f: {"CXX": full_disk(f)}, "the disk is full", "SVDQUANT_CACHE_DIR"),
    "cache-that-is-no-folder": (
        lambda f: {"SVDQUANT_CACHE_DIR": str(f / "csrc" / "launch.h" / "x")},
        "launch.h/x cannot be written",
        "set SVDQUANT_CACHE_DIR",
    ),
}


@needs_compiler
@pytest.mark.parametrize(("changes", "reason", "remedy"), FAILURES.values(), ids=FAILURES)
def test_failure_is_one_sentence_with_a_remedy(csrc, cache, changes, reason, remedy):
    said, warnings = build(csrc, cache, **changes(csrc.parent))
    assert reason in said["missing"]
    assert said["again"] == said["missing"]
    assert len(warnings) == 1 and reason in warnings[0] and remedy in warnings[0]
    assert names(cache) == []


@needs_compiler
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_read_only_cache(csrc, cache):
    cache.mkdir(mode=0o500)
    said, warnings = build(csrc, cache)
    assert "cannot be written" in said["missing"] and len(warnings) == 1


def test_ninja_is_asked_for(tmp_path):
    script(tmp_path, "")
    with pytest.raises(jit.Unavailable, match="ninja was not found") as caught:
        jit._check_tools({"CXX": "compiler", "PATH": str(tmp_path)})
    assert "pip install ninja" in caught.value.remedy


def test_off_builds_nothing(csrc, cache):
    said, warnings = build(csrc, cache, SVDQUANT_KERNELS="off")
    assert said["missing"] == "SVDQUANT_KERNELS is off" and warnings == [] and not cache.exists()


def test_importing_builds_nothing_and_wants_no_compiler(cache):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import pack; pack.alias()
from svdquant_nodes.svdquant.kernels import jit, ops, select
assert "torch.utils.cpp_extension" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(ROOT / "tools")]
    subprocess.run(command, env=environment(cache, PATH="", CXX="abacus"), check=True)
    assert not cache.exists()


def test_without_kernels_the_reference_runs(cache):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import pack; pack.alias()
import torch
from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.kernels import ops
from svdquant_nodes.tests import layers
w, x = layers.random_linear("int4", 32, 64, 4), layers.random(3, 64, seed=1)
assert torch.equal(linear.linear(x, w, ops), linear.linear(x, w, reference))
print(ops.describe("cpu"))
"""
    command = [sys.executable, "-c", code, str(ROOT / "tools")]
    done = subprocess.run(
        command, env=environment(cache, CXX="abacus"), check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("reference (not avx512: no C++ compiler named abacus was found;")
    assert done.stderr.count("SVDQuant: no cpu kernels") == 1


# ---- what the name of a library depends on ----


@pytest.fixture
def here(monkeypatch, csrc):
    monkeypatch.setattr(jit, "CSRC", csrc)
    return csrc


@pytest.mark.parametrize("file", ["ops.cpp", "launch.h", "cpu/kernel.cpp", "cpu/kernel.h"])
def test_key_follows_every_file(here, file):
    before = jit.key(jit.cpu_target())
    (here / file).write_text("// another\n")
    assert jit.key(jit.cpu_target()) != before


def test_key_follows_names_flags_torch_and_architecture(here, monkeypatch):
    target = jit.cpu_target()
    keys = {jit.key(target), jit.key(jit.Target("cpu", "cpu", (*target.flags, "-g")))}
    keys |= {jit.key(jit.cuda_target((8, 0))), jit.key(jit.cuda_target((8, 9)))}
    (here / "cpu" / "kernel.h").rename(here / "cpu" / "other.h")
    keys.add(jit.key(target))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(jit.key(target))
    assert len(keys) == 6


@pytest.mark.parametrize("file", ["README.md", "cpu/notes.txt", "cuda/kernel.cu"])
def test_key_leaves_out_what_is_not_compiled(here, file):
    before = jit.key(jit.cpu_target())
    (here / file).write_text("something")
    assert jit.key(jit.cpu_target()) == before


def test_targets():
    assert {"ops.cpp", "gemm.cpp", "avx2.cpp"} <= {file.name for file in jit.cpu_target().sources}
    hopper, ada = jit.cuda_target((9, 0)), jit.cuda_target((8, 9))
    assert (hopper.name, hopper.archs) == ("cuda-sm_90a", ("90a",))
    assert (ada.name, ada.archs) == ("cuda-sm_89", ("89",))
    assert "-DSVDQUANT_GPU" in ada.flags and "-DSVDQUANT_GPU" not in jit.cpu_target().flags


def test_one_library_for_all_gpus_of_a_machine():
    several = jit.cuda_target((12, 0), (8, 6), (12, 0), (7, 5))
    assert (several.name, several.archs) == ("cuda-sm_75-sm_86-sm_120a", ("75", "86", "120a"))
    assert several == jit.cuda_target((7, 5), (8, 6), (12, 0))


# ---- finding the CUDA toolkit ----


def toolkit(folder):
    """A folder that looks like one; its nvcc compiles for sm_75 and sm_90."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\nprintf 'sm_75\\nsm_90\\n'\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return folder


def test_cuda_home_is_looked_for_in_order(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(jit.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(jit, "USUAL_CUDA_HOME", str(tmp_path / "usual"))
    assert jit.cuda_home() is None
    package = toolkit(tmp_path / "site" / "nvidia" / "cu13")
    assert jit.cuda_home() == package
    usual = toolkit(tmp_path / "usual")
    assert jit.cuda_home() == usual
    on_path = toolkit(tmp_path / "usr")
    monkeypatch.setenv("PATH", str(on_path / "bin"))
    assert jit.cuda_home() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing-there"))
    assert jit.cuda_home() == on_path
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "named")))
    assert jit.cuda_home() == tmp_path / "named"


def test_a_script_that_calls_another_nvcc_is_no_toolkit(tmp_path, monkeypatch):
    script = toolkit(tmp_path / "usr")
    (script / "include" / "cuda_runtime.h").unlink()
    monkeypatch.setenv("PATH", str(script / "bin"))
    monkeypatch.setattr(jit, "USUAL_CUDA_HOME", str(toolkit(tmp_path / "usual")))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert jit.cuda_home() == tmp_path / "usual"


@pytest.mark.skipif(jit.WINDOWS, reason="its linker wants a .lib, which PyPI's packages have")
def test_a_runtime_library_without_the_name_that_linkers_look_for(tmp_path):
    """As in PyPI's packages: it would fail when all is compiled."""
    home, folder = toolkit(tmp_path / "cuda"), tmp_path / "build"
    (home / "lib").mkdir()
    folder.mkdir()
    assert jit._runtime(home, folder) == []
    (home / "lib" / "libcudart.so.13").touch()
    assert jit._runtime(home, folder) == [f"-L{folder}"]
    assert (folder / "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"
    (home / "lib" / "libcudart.so").touch()
    assert jit._runtime(home, folder) == []


def test_a_gpu_newer_than_the_toolkit(tmp_path):
    """Alone it is refused in words; beside others it is left out, and they get their library."""
    environment = {"CUDA_HOME": str(toolkit(tmp_path / "cuda"))}
    with pytest.raises(jit.Unavailable, match="nvcc does not know sm_120a") as caught:
        jit._known_archs(jit.cuda_target((12, 0)), environment)
    assert "as new as the GPU" in caught.value.remedy
    assert jit._known_archs(jit.cuda_target((12, 0), (9, 0), (7, 5)), environment) == ["75", "90a"]


def test_no_toolkit_is_said(monkeypatch):
    monkeypatch.setattr(jit, "cuda_home", lambda: None)
    with pytest.raises(jit.Unavailable, match="no CUDA toolkit in CUDA_HOME"):
        jit._environment(jit.cuda_target((8, 9)))
