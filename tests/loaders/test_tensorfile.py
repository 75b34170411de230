"""The container: what opens, without a copy, and every way in which a file can lie."""

from __future__ import annotations

import json
import pickle
import zipfile

import pytest
import torch

from svdquant_nodes.loaders import tensorfile
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.tensorfile import join_files, open_file
from svdquant_nodes.tests.loaders import made


def entry(dtype="BF16", shape=(2, 2), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_dtype_comes_back_as_the_library_wrote_it(tmp_path):
    values = torch.arange(12).reshape(3, 4)
    tensors = {name: values.to(dtype) for name, dtype in tensorfile.DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 5), "scalar": torch.tensor(3.5)}
    file = open_file(made.save(tmp_path / "all.safetensors", tensors, {"note": "kept"}))
    assert made.same_tensors(file, tensors)
    assert file.metadata == {"note": "kept"}


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    path = made.save(
        tmp_path / "a.safetensors", {"a": torch.arange(8.0), "b": torch.arange(4).to(torch.int8)}
    )
    file = open_file(path)
    for name in "ab":
        storage = file[name].untyped_storage()
        assert storage.nbytes() == path.stat().st_size
        assert file[name].data_ptr() - storage.data_ptr() == file.info[name].begin
    file["a"][0] = 99
    assert open_file(path)["a"][0] == 0, "the map is private: nobody can write into the file"


def test_opening_full_size_flux_reads_the_header_only(tmp_path, monkeypatch):
    """The counts and bytes are those of the published file."""
    path, size = made.sparse(tmp_path / "flux.safetensors", made.flux_dev_shapes())
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: pytest.fail("tensor bytes were mapped"))
    checkpoint = open_checkpoint(path)
    assert (len(checkpoint.stored), size) == (2604, 6_767_999_104)
    assert len(checkpoint.layers) == 19 * 10 + 38 * 5
    layer = checkpoint.info["single_transformer_blocks.37.mlp_fc2"]
    assert (layer.out_features, layer.in_features, layer.rank) == (3072, 12288, 32)
    nbytes = sum(info.nbytes for info in (*checkpoint.info.values(), *checkpoint.plain_info.values()))
    assert nbytes == size


def test_opening_full_size_nvfp4_flux(tmp_path):
    path, size = made.sparse(tmp_path / "flux.safetensors", made.flux_dev_shapes(fp4=True))
    checkpoint = open_checkpoint(path)
    assert (len(checkpoint.stored), size) == (2908, 7_038_360_136)
    assert checkpoint.info["transformer_blocks.0.qkv_proj"].spec.format == "nvfp4"


def test_host_prefix_is_stripped(tmp_path):
    file = open_file(made.save(tmp_path / "a.safetensors", {"model.diffusion_model.x.weight": torch.ones(1)}))
    assert list(file) == ["x.weight"]


def test_misaligned_tensor_is_read(tmp_path):
    data = torch.tensor([1], dtype=torch.int8), torch.tensor([2.5, -1.0])
    header = {"a": entry("I8", [1], (0, 1)), "b": entry("F32", [2], (1, 9))}
    file = open_file(
        made.raw(tmp_path / "a.safetensors", header, b"".join(t.numpy().tobytes() for t in data))
    )
    assert torch.equal(file["b"], data[1])


def test_tensors_of_inference_mode_are_usable(tmp_path):
    path = made.save(tmp_path / "a.safetensors", {"a": torch.arange(8.0)})
    with torch.inference_mode():
        file = open_file(path)
        assert float(file["a"].sum()) == 28
    assert float(file["a"].sum()) == 28


FOREIGN = {
    "pickle": (pickle.dumps({"weight": [1.0] * 20}), "a Python pickle, which can run code"),
    "old-torch": (b"\x80\x02" + b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a Python pickle, which can run code"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "web-page": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "empty": (b"", "an empty one"),
    "noise": (bytes(range(200, 256)), "something else"),
    "four-bytes": (b"\x01\x02\x03\x04", "something else"),
}


@pytest.mark.parametrize("content, found", FOREIGN.values(), ids=FOREIGN)
def test_other_formats_under_our_name(tmp_path, content, found):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors: expected a safetensors file, got .*{found}"):
        open_file(path)


def test_zip_under_our_name(tmp_path):
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(ValueError, match="got a zip archive, perhaps a PyTorch checkpoint"):
        open_file(path)


def test_pickle_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("went-off").touch, ())

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickle"):
        open_checkpoint(path)
    assert not (tmp_path / "went-off").exists()


@pytest.mark.parametrize("keep", [4, 30, -1], ids=["in-the-length", "in-the-header", "in-the-data"])
def test_truncated_file(tmp_path, keep):
    path = made.save(tmp_path / "model.safetensors", {"a": torch.arange(64.0), "b": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: expected .* Download the file again"):
        open_file(path)


LIES = {
    "not-json": (b"{not json", "header: expected JSON"),
    "not-utf8": (b'{"\xff": 1}', "header: expected JSON"),
    "nested-deep": (b'{"a":' + b"[" * 200_000, "header: expected JSON"),
    "not-an-object": (b"[1, 2]", "header: expected a JSON object, got list"),
    "name-twice": (b'{"a":{},"a":{}}', "the name 'a' stands twice"),
    "metadata-not-strings": ({"__metadata__": {"a": 1}}, "__metadata__: expected strings by name"),
    "entry-not-object": ({"a": 5}, "a: expected dtype, shape and data_offsets, got 5"),
    "entry-lacks-dtype": ({"a": {"shape": [], "data_offsets": [0, 8]}}, "a: expected dtype"),
    "unknown-dtype": ({"a": entry("F3")}, "a: expected a dtype of .*, got 'F3'"),
    "negative-size": ({"a": entry(shape=(-2, -2))}, "non-negative whole numbers"),
    "size-as-text": ({"a": entry(shape=("2", 2))}, "non-negative whole numbers"),
    "size-as-bool": ({"a": entry(shape=(True, 4))}, "non-negative whole numbers"),
    "three-offsets": ({"a": entry(offsets=(0, 4, 8))}, "non-negative whole numbers"),
    "offsets-backwards": ({"a": entry(offsets=(8, 0))}, r"a: expected 8 bytes for BF16 \[2, 2\]"),
    "shape-lies": ({"a": entry(shape=(2, 3))}, r"a: expected 12 bytes for BF16 \[2, 3\], got .* \(8 bytes\)"),
    "huge-shape": ({"a": entry(shape=(2**62, 2**62))}, "a: expected .* bytes for BF16"),
    "empty-but-huge": ({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, "a: expected a shape within"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, "b: expected to begin at byte 8, got 4: it overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(10, 18))}, "b: expected to begin at byte 8, got 10: it leaves a hole"),
    "past-the-end": ({"a": entry(), "b": entry(offsets=(8, 16))}, r"expected .* bytes by its header, .*truncated"),
    "bytes-unclaimed": ({}, "bytes after the last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("header, message", LIES.values(), ids=LIES)
def test_header_that_lies(tmp_path, header, message):
    path = made.raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=f"^model.safetensors: .*{message}"):
        open_file(path)


def test_header_longer_than_the_limit(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + json.dumps({}).encode())
    with pytest.raises(ValueError, match=r"model.safetensors: expected a safetensors file"):
        open_file(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no.safetensors: expected a safetensors file, got nothing at"):
        open_file(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="expected a safetensors file, got a folder"):
        open_file(tmp_path)


def test_two_files_with_the_same_tensor(tmp_path):
    files = [made.save(tmp_path / f"{n}.safetensors", {"a": torch.ones(1)}) for n in (1, 2)]
    with pytest.raises(
        ValueError, match=r"a: expected one tensor of this name, got two \(in 1.safetensors and 2"
    ):
        join_files(tmp_path, files)
