"""Names in workflows to files in folders, also where the workflow was made with others."""

from __future__ import annotations

import folder_paths
import pytest

from svdquant_nodes.svdquant.adapters import folders


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The host's only folder of diffusion models."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, folders.MODELS, ([str(tmp_path)], {".safetensors"})
    )
    for name in (
        "flat.safetensors",
        "a b/ü 模型.safetensors",
        "a/twice.safetensors",
        "b/twice.safetensors",
        "a/transformer_blocks.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("flat.safetensors", "flat.safetensors"),
        ("flux/flat.safetensors", "flat.safetensors"),
        ("flux\\dev\\flat.safetensors", "flat.safetensors"),
        ("a b\\ü 模型.safetensors", "a b/ü 模型.safetensors"),
        ("ü 模型.safetensors", "a b/ü 模型.safetensors"),
        ("b\\twice.safetensors", "b/twice.safetensors"),
    ],
    ids=[
        "as-listed",
        "in-no-folder-here",
        "windows",
        "space-and-unicode",
        "in-a-folder-here",
        "exact-one-of-two",
    ],
)
def test_a_name_from_another_folder_layout(models, name, file):
    assert folders.find(folders.MODELS, name) == models / file


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "twice.safetensors",
            r"expected one file of this name, got a/twice.safetensors, b/twice.safetensors",
        ),
        ("b/transformer_blocks.safetensors", r"not in ComfyUI's diffusion_models folders"),
        ("/flat.safetensors", "not in ComfyUI's"),
        ("C:\\flat.safetensors", "not in ComfyUI's"),
        ("../flat.safetensors", "not in ComfyUI's"),
        ("gone.safetensors", "not in ComfyUI's"),
        ("", "no name: not in ComfyUI's"),
        (
            "x/svdq-int4_r32-flux.1-dev.safetensors",
            r"bring it with SVDQuant Fetch Model, where it is flux.1-dev-int4",
        ),
    ],
    ids=["two", "folder-tells-apart", "root", "drive", "up", "dangling-link", "empty", "published"],
)
def test_a_name_of_no_file_or_several(models, name, reason):
    with pytest.raises(ValueError, match=reason):
        folders.find(folders.MODELS, name)
