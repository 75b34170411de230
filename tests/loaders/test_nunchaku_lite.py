"""The diffusers nunchaku_lite dialect: a folder with a config.json, sharded or not, or its file alone."""

from __future__ import annotations

import json
import re

import pytest

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.nunchaku_linear import decode_linear
from svdquant_nodes.tests import golden
from svdquant_nodes.tests.loaders import made

NAMES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
FILE = "diffusion_pytorch_model.safetensors"


def lite_layer(name: str) -> dict:
    tensors = made.as_v2(made.layer(name))
    del tensors[f"{name}.smooth_factor_orig"]
    return tensors


TENSORS = lite_layer(NAMES[0]) | lite_layer(NAMES[1]) | made.PLAIN


def config(**changes) -> str:
    w4a4 = {"precision": "int4", "group_size": 64, "rank": 16, "targets": list(NAMES), **changes}
    return json.dumps({"quantization_config": {"quant_method": "nunchaku_lite", "svdq_w4a4": w4a4}})


def folder(path, *, text: str = "", shards: int = 1):
    path.mkdir(parents=True)
    (path / "config.json").write_text(text or config())
    if shards == 1:
        made.save(path / FILE, TENSORS)
        return path
    weight_map = {}
    for i in range(shards):
        part = dict(list(TENSORS.items())[i::shards])
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(made.save(path / file, part) and part, file)
    (path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def check(found):
    assert found.dialect == "nunchaku_lite" and found.warnings == ()
    want = decode_linear(golden.case("svdq_int4_linear", "c0.packed")).tensors()
    assert all(made.same_tensors(found.layers[name].tensors(), want) for name in NAMES)
    assert set(found.plain) == set(made.PLAIN)


@pytest.mark.parametrize("shards", [1, 3], ids=["one-file", "three-shards"])
def test_folder(tmp_path, shards):
    check(open_checkpoint(folder(tmp_path / "model", shards=shards)))


def test_a_folder_is_what_its_config_says(tmp_path):
    """Even with the original smoothing vectors, which files of the engine have."""
    path = folder(tmp_path / "model")
    made.save(path / FILE, made.as_v2(made.layer(NAMES[0]) | made.layer(NAMES[1])) | made.PLAIN)
    assert open_checkpoint(path).dialect == "nunchaku_lite"


def test_any_file_of_the_folder_opens_the_folder(tmp_path):
    path = folder(tmp_path / "model", shards=2)
    check(open_checkpoint(path / "diffusion_pytorch_model-00002-of-00002.safetensors"))


def test_transformer_of_a_whole_pipeline(tmp_path):
    folder(tmp_path / "pipeline" / "transformer")
    check(open_checkpoint(tmp_path / "pipeline"))


def test_file_alone_is_known_by_its_names(tmp_path):
    check(open_checkpoint(made.save(tmp_path / "a.safetensors", TENSORS)))


def test_nvfp4_layers_have_both_second_scales(tmp_path):
    tensors = made.as_v2(made.layer("x", "f1", "svdq_nvfp4_linear"))
    del tensors["x.smooth_factor_orig"]
    tensors["x.wtscale"] = golden.case("svdq_nvfp4_linear", "f0.packed")["wtscale"]
    w = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors)).layers["x"]
    rows = golden.nvfp4_linear("f1").second_scale
    assert made.same(w.second_scale, rows.float() * tensors["x.wtscale"].float())


def test_missing_shard(tmp_path):
    path = folder(tmp_path / "model", shards=3)
    (path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"model: expected diffusion_pytorch_model-00002-of-00003.safetensors in"
    ):
        open_checkpoint(path)


def test_folder_without_tensors(tmp_path):
    path = folder(tmp_path / "model")
    (path / FILE).unlink()
    with pytest.raises(ValueError, match=r"model: expected a .safetensors file in .*, got none"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_broken_index(tmp_path, text):
    path = folder(tmp_path / "model", shards=2)
    (path / f"{FILE}.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json: expected JSON with a weight_map"):
        open_checkpoint(path)


def test_index_cannot_leave_the_folder(tmp_path):
    path = folder(tmp_path / "model", shards=2)
    made.save(tmp_path / "secret.safetensors", made.PLAIN)
    (path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"model: expected secret.safetensors in .*model, got none"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(precision="nvfp4"), "says precision nvfp4, the tensors are int4; tensors win"),
        (dict(rank=128), r"says rank 128, the tensors have \[16\]; tensors win"),
        (
            dict(targets=[*NAMES, "gone.to_v"]),
            r"lists 1 layers the file does not quantize \(first: gone.to_v\)",
        ),
    ],
    ids=["precision", "rank", "targets"],
)
def test_config_that_disagrees_is_a_warning(tmp_path, changes, message):
    found = open_checkpoint(folder(tmp_path / "model", text=config(**changes)))
    assert len(found.warnings) == 1
    assert re.search(message, found.warnings[0])
    assert found.layers[NAMES[0]].rank == 16


@pytest.mark.parametrize(
    "changes",
    [
        dict(precision=["int4"]),
        dict(precision={"all": "int4"}),
        dict(rank=[16]),
        dict(rank="16"),
        dict(targets=3),
        dict(targets=[[NAMES[0]], None]),
    ],
    ids=str,
)
def test_config_of_other_kinds_says_nothing(tmp_path, changes):
    found = open_checkpoint(folder(tmp_path / "model", text=config(**changes)))
    assert found.warnings == () and found.layers[NAMES[0]].rank == 16
