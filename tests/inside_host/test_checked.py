"""Files of nodes before the graph runs: found, read once while they stay the same, noticed when replaced."""

from __future__ import annotations

import json
import os

import folder_paths
import pytest

from svdquant_nodes.nodes import checked, load_model, load_text_encoder, quantize_text_encoder
from svdquant_nodes.svdquant.adapters import folders


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The only file of the host's folders."""
    for kind in (folders.MODELS, folders.TEXT_ENCODERS):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "flux").mkdir()
    path = tmp_path / "flux" / "model.4bit.safetensors"
    path.write_bytes(b"one")
    return path


def replace(path, content):
    new = path.with_suffix(".new")
    new.write_bytes(content)
    told = path.stat()
    os.utime(new, ns=(told.st_atime_ns, told.st_mtime_ns + 10**9))
    new.replace(path)


def test_a_header_is_read_again_only_when_the_file_was_replaced(model):
    read = []

    def check(path):
        read.append(path.read_bytes())

    for _ in range(3):
        assert checked.checked(folders.MODELS, "model.4bit.safetensors", check=check) is True
    replace(model, b"two")
    assert checked.checked(folders.MODELS, "model.4bit.safetensors", check=check) is True
    assert read == [b"one", b"two"]


def test_a_refusal_is_not_remembered(model):
    read = []

    def check(path):
        read.append(path)
        if len(read) < 3:
            raise ValueError("no good")

    told = [checked.checked(folders.MODELS, "model.4bit.safetensors", check=check) for _ in range(4)]
    assert told == ["no good", "no good", True, True] and len(read) == 3


def test_a_file_that_was_replaced_is_loaded_again(model):
    def node(name):
        return load_model.SVDQuantLoadModel.fingerprint_inputs(model_name=name, activations="auto")

    before = node("flux/model.4bit.safetensors")
    assert json.loads(json.dumps(before)) == before and "model" not in str(before)  # saved with each picture
    assert before and node("flux/model.4bit.safetensors") == before
    assert node("other/model.4bit.safetensors") == before
    replace(model, b"two")
    assert node("flux/model.4bit.safetensors") != before
    assert node("nothing.safetensors") == [] == node(None)


def test_text_encoders_of_another_folder_layout(model):
    def told(*names):
        return load_text_encoder.SVDQuantLoadTextEncoder.validate_inputs(*names)

    assert told("t5\\model.4bit.safetensors", "none") is True
    assert "gone.safetensors: not in ComfyUI's text_encoders folders" in told(
        "model.4bit.safetensors", "gone.safetensors"
    )
    refused = quantize_text_encoder.SVDQuantQuantizeTextEncoder.validate_inputs("x/model.4bit.safetensors")
    assert refused.startswith("model.4bit.safetensors: expected a safetensors file")


def refusing(path):
    if path.name.startswith("bad"):
        raise ValueError(f"{path.stem}: expected a model, got none")


CHECKED = {  # names -> the answer
    "one": (("good",), True),
    "none-yet": ((None,), True),
    "no-names": ((), True),
    "a-bad-one-behind": ((None, "good", "bad-1", "bad-2"), "bad-1: expected a model, got none"),
}


@pytest.mark.parametrize(("names", "answer"), CHECKED.values(), ids=CHECKED)
def test_files_are_refused_in_the_words_of_their_check(model, names, answer):
    for name in ("good", "bad-1", "bad-2"):
        model.with_name(f"{name}.safetensors").touch()
    files = [name and f"flux/{name}.safetensors" for name in names]
    assert checked.checked(folders.MODELS, *files, check=refusing) == answer


def test_what_is_no_refusal_is_raised(model):
    """A mistake of ours is not told as if it were the user's."""
    with pytest.raises(KeyError):
        checked.checked(folders.MODELS, "flux/model.4bit.safetensors", check={}.__getitem__)
