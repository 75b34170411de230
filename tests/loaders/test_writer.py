"""The streaming writer: files any reader takes, one layer in memory, and a whole file or none."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from svdquant_nodes.loaders import kitchen, natural, nunchaku
from svdquant_nodes.loaders.checkpoint import Lazy
from svdquant_nodes.loaders.tensorfile import DTYPES, open_file
from svdquant_nodes.loaders.writer import TensorWriter, header_room, write_checkpoint
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.loaders import made

ODD = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.ones(3, dtype=torch.float16),
    "double": torch.ones(3, dtype=torch.float64),
    "nothing": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    'quote " and ü': torch.ones(1),
}


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".part"]


def test_the_safetensors_library_reads_it(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = ODD | {f"d.{name}": torch.ones(2, 2).to(dtype) for name, dtype in DTYPES.items()}
    write_checkpoint(path, {}, tensors, {"config": '{"ü": 1}'}, dict)
    assert made.same_tensors(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"config": '{"ü": 1}'}
    assert made.same_tensors(open_file(path), tensors)


def test_every_tensor_is_aligned(tmp_path):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"x": layers.random_linear("nvfp4", 128, 128)}, ODD, {}, nunchaku.encode_linear)
    for info in open_file(path).info.values():
        assert info.begin % info.dtype.itemsize == 0


@pytest.mark.parametrize("dialect", [kitchen, natural, nunchaku], ids=lambda d: d.__name__.rpartition(".")[2])
def test_eight_bits_are_in_no_file(tmp_path, dialect):
    eight = layers.random_linear("int8-of-int4", 128, 128)
    with pytest.raises(ValueError, match="x: expected weights as files hold them, got int8"):
        dialect.write(tmp_path / "a.safetensors", {"x": eight}, {}, {})
    assert not any(tmp_path.iterdir())


def test_one_layer_in_memory(tmp_path):
    made_layers: list[weakref.ref] = []
    tensors: list[weakref.ref] = []

    def make(name):
        gc.collect()
        assert all(old() is None for old in [*made_layers, *tensors]), "an earlier layer is still held"
        w = layers.random_linear("int4", 128, 128)
        made_layers.append(weakref.ref(w))
        tensors.extend(map(weakref.ref, w.tensors().values()))
        return w

    natural.write(tmp_path / "a.safetensors", Lazy([f"l{i}" for i in range(5)], make), {}, {})
    assert len(made_layers) == 5


def test_the_header_has_room_for_its_metadata(tmp_path):
    """More of it than the slack for what an encoder adds."""
    config = "x" * 100_000
    write_checkpoint(tmp_path / "a.safetensors", {}, {"a": torch.ones(2)}, {"config": config}, dict)
    assert open_file(tmp_path / "a.safetensors").metadata == {"config": config}


def test_progress_counts_layers(tmp_path):
    seen = []
    w = layers.random_linear("awq", 128, 128)
    natural.write(
        tmp_path / "a.safetensors", {"a": w, "b": w}, {}, {}, progress=lambda *step: seen.append(step)
    )
    assert seen == [("a", 1, 2), ("b", 2, 2)]


FAILURES = {
    "ctrl-c": (KeyboardInterrupt(), KeyboardInterrupt, None),
    "disk-full": (OSError(errno.ENOSPC, "No space left"), ValueError, "a.safetensors: the disk is full"),
    "other-io": (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
    "bad-layer": (ValueError("x: bad"), ValueError, "x: bad"),
}


@pytest.mark.parametrize("failure, kind, message", FAILURES.values(), ids=FAILURES)
def test_a_failure_leaves_the_target_as_it_was(tmp_path, failure, kind, message):
    def fail(*_):
        raise failure

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(kind, match=message):
        natural.write(path, {"a": layers.random_linear("int4", 128, 128)}, {}, {}, progress=fail)
    assert path.read_bytes() == b"before" and not leftovers(tmp_path)


def test_a_disk_that_is_full_at_the_last_moment(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ValueError, match="the disk is full; nothing was written"):
        write_checkpoint(tmp_path / "a.safetensors", {}, made.PLAIN, {}, dict)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_another_program_holds_as_on_windows(tmp_path, monkeypatch):
    def held(*_):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(Path, "replace", held)
    with pytest.raises(
        ValueError, match="a.safetensors: cannot be replaced, since a program has it open. Close it"
    ):
        write_checkpoint(tmp_path / "a.safetensors", {}, made.PLAIN, {}, dict)
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, {}, header_room(["a"], {})) as out:
        out.add("a", torch.ones(1024))
        assert not path.exists() and leftovers(tmp_path)
    assert path.exists() and not leftovers(tmp_path)


def test_the_same_name_twice(tmp_path):
    w = layers.random_linear("int4", 128, 128)
    with pytest.raises(ValueError, match=r"x.weight: expected one tensor of this name, got two"):
        kitchen.write(tmp_path / "a.safetensors", {"x": w}, {"x.weight": torch.ones(4)}, {})


@pytest.mark.parametrize(
    "where, message", [("no/a.safetensors", "expected a folder"), ("", "expected a file name")]
)
def test_a_target_that_cannot_be(tmp_path, where, message):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / where, {}, made.PLAIN, {}, dict)
