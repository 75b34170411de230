"""Loading: what a loaded model is, and how a bad file is refused without a trace."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import QuantizedLinear, quantized_linears
from svdquant_nodes.tests.inside_host.twins import DEMO_BF16, DEMO_INT4, error, sample


def test_is_the_hosts_own_patcher_and_model(quantized):
    import comfy.ldm.flux.model
    import comfy.model_patcher

    assert type(quantized) is comfy.model_patcher.CoreModelPatcher
    assert type(quantized.model.diffusion_model) is comfy.ldm.flux.model.Flux


def test_every_linear_of_the_blocks_is_quantized(quantized):
    blocks = [
        (name, module)
        for name, module in quantized.model.diffusion_model.named_modules()
        if isinstance(module, QuantizedLinear) and "_blocks." in name
    ]
    assert blocks
    assert all(module.quantized for _, module in blocks)
    assert len(blocks) == len(list(quantized_linears(quantized.model)))


def test_close_to_the_16_bit_model(quantized):
    import comfy.sd

    reference = comfy.sd.load_diffusion_model(str(DEMO_BF16))
    assert (
        error(sample(quantized), sample(reference)) < 0.3
    )  # noise as input; the picture test is the sharper one


def test_two_loads_share_no_state(quantized):
    other = load_model(DEMO_INT4)
    classes = {type(layer) for model in (quantized, other) for _, layer in quantized_linears(model.model)}
    assert len(classes) == 2
    assert torch.equal(sample(other), sample(quantized))


def _changed(tmp_path, change):
    from safetensors import safe_open

    with safe_open(DEMO_INT4, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(DEMO_INT4)
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def test_missing_piece_of_a_fused_layer(tmp_path):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith("single_transformer_blocks.1.out_proj.")]:
            del tensors[name]

    with pytest.raises(
        ValueError, match=r"single_blocks\.1\.linear2: expected 2 stored linears, .*out_proj missing"
    ):
        load_model(_changed(tmp_path, drop))


def test_missing_plain_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"changed\.safetensors: txt_in\.weight is missing"):
        load_model(_changed(tmp_path, lambda tensors: tensors.pop("context_embedder.weight")))


def test_missing_block(tmp_path):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith("single_transformer_blocks.0.")]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"single_blocks\.1\.\S+ has no place in this model.* incomplete"):
        load_model(_changed(tmp_path, drop))


def test_unknown_extra_tensor_only_warns(tmp_path, caplog):
    path = _changed(tmp_path, lambda tensors: tensors.update(stray=torch.ones(3)))
    with caplog.at_level("WARNING"):
        load_model(path)
    assert "1 tensors not used, such as stray" in caplog.text


def test_nan_scale_names_file_and_key(tmp_path):
    def spoil(tensors):
        tensors["transformer_blocks.0.qkv_proj.wscales"][0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"changed\.safetensors.*qkv_proj\.wscales.*NaN"):
        load_model(_changed(tmp_path, spoil))


def test_modulation_without_its_bias_names_file_and_layer(tmp_path):
    name = "transformer_blocks.0.norm1.linear"
    path = _changed(tmp_path, lambda tensors: tensors.pop(f"{name}.bias"))
    with pytest.raises(
        ValueError, match=rf"^changed\.safetensors: {name}: modulation: expected a bias .*got no bias"
    ):
        load_model(path)
