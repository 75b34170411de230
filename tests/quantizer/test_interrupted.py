"""Full disks, folders that may not be written, killed runs: a clear sentence, and no broken file."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from svdquant_nodes.loaders import writer
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.quantizer import stream
from svdquant_nodes.tests.quantizer import tiny
from svdquant_nodes.tests.quantizer.test_stream import quantize, svdquant
from svdquant_nodes.tools.pack import ROOT

NOBODY = 65534


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny.safetensors", tiny.flux())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(source, small_disk):
    target = small_disk / "out.safetensors"
    with pytest.raises(ValueError, match=r"^out\.safetensors: the disk is full; finished linears are kept"):
        quantize(source, target)
    assert [file.name for file in small_disk.iterdir()] == [".out.safetensors.unfinished"]
    assert list((small_disk / ".out.safetensors.unfinished").glob("*.part")) == []


class Full:
    """A file that takes so many bytes in all, and no more."""

    left = 0

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self._stream.__exit__(*error)

    def write(self, data):
        Full.left -= len(data)
        if Full.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._stream.write(data)


@pytest.mark.parametrize("room", [60_000, 700_000], ids=["in-a-linear", "in-the-finished-file"])
def test_space_that_ends_and_comes_back(source, tmp_path, monkeypatch, room):
    target, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    quantize(source, whole)
    with monkeypatch.context() as patch:
        Full.left, enter = room, writer.TensorWriter.__enter__

        def entered(self):
            enter(self)
            self._stream = Full(self._stream)
            return self

        patch.setattr(writer.TensorWriter, "__enter__", entered)
        with pytest.raises(ValueError, match="the disk is full; finished linears are kept. Free space in"):
            quantize(source, target)
    assert not target.exists()
    quantize(source, target)
    assert target.read_bytes() == whole.read_bytes()


@contextlib.contextmanager
def as_nobody():
    """Lose root's right to write anywhere for a while."""
    if not hasattr(os, "setresuid") or os.geteuid():
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_a_folder_that_may_not_be_written(tmp_path):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = make_plan(open_source(tiny.write(folder / "tiny.safetensors", tiny.flux())), rank=16)
        folder.chmod(0o555)
        with (
            as_nobody(),
            pytest.raises(ValueError, match=r"out\.safetensors: cannot be written\. Name a file"),
        ):
            stream.quantize(plan, folder / "out.safetensors", stream.Settings("instant"))
        folder.chmod(0o755)
        assert [file.name for file in folder.iterdir()] == ["tiny.safetensors"]


def test_a_target_that_is_a_folder(source, tmp_path):
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        quantize(source, tmp_path / "out.safetensors")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import pack; pack.alias()
from svdquant_nodes.tests.quantizer.test_stream import quantize
from pathlib import Path
def die(name, done, total, error):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
quantize(Path(sys.argv[2]), Path(sys.argv[3]), progress=die)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(source, tmp_path, monkeypatch):
    target, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED, ROOT / "tools", source, target], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    made, real = [], stream.make
    monkeypatch.setattr(stream, "make", lambda s, job, *rest: made.append(job.name) or real(s, job, *rest))
    quantize(source, target)
    assert len(made) == 15 - 7
    quantize(source, whole)
    assert target.read_bytes() == whole.read_bytes()


def test_a_checkpoint_with_text_encoder_and_vae_inside(source, tmp_path):
    """The model alone is quantized, the same as from a file of its own, and the rest is said to be left out."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in tiny.flux().items()}
    for other in ("text_encoders.t5xxl.shared", "cond_stage_model.a", "first_stage_model.decoder.conv_in"):
        tensors[f"{other}.weight"] = tiny.flux()["img_in.weight"]
    path, target = tiny.write(tmp_path / "all.safetensors", tensors), tmp_path / "out.safetensors"
    done = svdquant(path, target, "--rank", "16", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "note: 3 tensors of text encoders, VAE and the like were left out" in done.stderr
    quantize(source, tmp_path / "alone.safetensors")
    made, alone = (open_checkpoint(tmp_path / name) for name in ("out.safetensors", "alone.safetensors"))
    assert list(made.info) == list(alone.info)
    assert set(made.plain_info) == set(alone.plain_info)
