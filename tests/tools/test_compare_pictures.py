"""What `compare --draw` sends to a host, and which models that host sees."""

from __future__ import annotations

import json

import pytest

from svdquant_nodes.tools.commands import compare_pictures
from svdquant_nodes.tools.pack import ROOT


def test_the_two_files_go_into_the_loaders_of_any_workflow():
    flux = json.loads((ROOT / "workflows" / "api" / "compare-flux.json").read_text())
    for prompt in (flux, compare_pictures.demo_prompt()):
        filled = compare_pictures.with_files(prompt, "a.safetensors", "b.safetensors")
        named = {node["class_type"]: node["inputs"] for node in filled.values()}
        assert named["UNETLoader"]["unet_name"] == "a.safetensors"
        assert named["SVDQuantLoadModel"]["model_name"] == "b.safetensors"
        assert "a.safetensors" not in json.dumps(prompt)  # the caller's own stays as it was


def test_a_workflow_that_compares_nothing():
    demo = json.loads((ROOT / "workflows" / "api" / "demo.json").read_text())
    with pytest.raises(ValueError, match="--workflow: expected a node SVDQuantCompare in it, got none"):
        compare_pictures.with_files(demo, "a", "b")


def test_the_host_sees_both_models_and_the_other_folders(tmp_path):
    for name in ("here/a.safetensors", "there/b.safetensors", "models/vae/ae.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    pair = (tmp_path / "here" / "a.safetensors", tmp_path / "there" / "b.safetensors")
    compare_pictures.link_models(tmp_path / "host", pair, tmp_path / "models")
    seen = {str(p.relative_to(tmp_path / "host")) for p in (tmp_path / "host").rglob("*.safetensors")}
    assert {"diffusion_models/a.safetensors", "diffusion_models/b.safetensors"} <= seen
    assert (tmp_path / "host" / "vae" / "ae.safetensors").is_file()
    assert not (tmp_path / "host" / "text_encoders").exists()
