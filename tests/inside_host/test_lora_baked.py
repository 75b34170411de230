"""A baked checkpoint is the checkpoint with the LoRA: through the host, against the LoRA at run time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from svdquant_nodes.svdquant.adapters.baking.bake import bake
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.lora.apply import apply_lora
from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import DEMO_INT4, DEMO_LORA, EXACT_ACTIVATIONS, error, sample
from svdquant_nodes.tests.tolerances import assert_close


def bf16(tensors):
    """With alpha = rank, so that nothing has to be rounded when the LoRA moves into a bf16 branch."""
    return {
        name: torch.tensor(4.0) if name.endswith(".alpha") else t.bfloat16().contiguous()
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_baked_is_applied(twins, tmp_path, naming):
    path = tmp_path / "some.safetensors"
    save_file(bf16(getattr(loras, naming)()), path)
    baked = bake(DEMO_INT4, [(path, 1.0)], tmp_path / "baked.safetensors")
    model = load_model(baked.target, ops=EXACT_ACTIVATIONS)
    if baked.rest:
        model, _ = apply_lora(model, baked.rest, 1.0)
    wanted = sample(apply_lora(twins.quantized, path, 1.0)[0])
    assert error(wanted, sample(twins.quantized)) > 0.02
    assert_close(sample(model), wanted, "host_twin")


def test_the_demo_lora_at_a_strength(twins, tmp_path):
    """Its alpha and the strength are folded in, with one rounding to bf16."""
    baked = bake(DEMO_INT4, [(DEMO_LORA, 0.6)], tmp_path / "baked.safetensors")
    model = load_model(baked.target, ops=EXACT_ACTIVATIONS)
    if baked.rest:
        model, _ = apply_lora(model, baked.rest, 1.0)
    assert_close(sample(model), sample(apply_lora(twins.quantized, DEMO_LORA, 0.6)[0]), "host_dense_branch")


def test_the_node_writes_both_files(tmp_path, monkeypatch):
    from svdquant_nodes.nodes.bake_lora import SVDQuantBakeLora
    from svdquant_nodes.svdquant.adapters import folders

    save_file(bf16(loras.kohya()), tmp_path / "some.safetensors")
    found = {folders.MODELS: DEMO_INT4, folders.LORAS: tmp_path / "some.safetensors"}
    monkeypatch.setattr(folders, "find", lambda kind, name: found[kind])
    monkeypatch.setattr(folders, "download_folder", lambda kind: tmp_path / kind)
    for kind in found:
        (tmp_path / kind).mkdir()
    made = SVDQuantBakeLora.execute("model", "lora", 0.8, "mine.safetensors")
    assert made.args[0].startswith("mine.safetensors: ")
    assert (tmp_path / folders.MODELS / "mine.safetensors").is_file()
    assert (tmp_path / folders.LORAS / "mine-rest.safetensors").is_file()
