"""LoRA on quantized layers equals the host's own merge on the dense twin, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from svdquant_nodes.svdquant.adapters.lora.apply import apply_lora
from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import error, sample
from svdquant_nodes.tests.tolerances import assert_close

NAMINGS = {"kohya": loras.kohya, "comfy": loras.comfy_names, "diffusers-slices": loras.diffusers}
DENSE = {"dora": loras.dora, "loha": loras.loha}


def test_without_lora_the_twins_agree(twins):
    assert_close(sample(twins.quantized), sample(twins.dense), "host_twin")


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.7])
@pytest.mark.parametrize("naming", NAMINGS)
def test_stock_loader(twins, naming, strength):
    made = NAMINGS[naming]()
    quantized, dense = (loras.stock(m, made, strength) for m in (twins.quantized, twins.dense))
    expected = sample(dense)
    assert error(expected, sample(twins.dense)) > 0.02, (
        "the LoRA must do something for the test to mean anything"
    )
    assert_close(sample(quantized), expected, "host_twin")


def test_16_bit_layers_are_merged_by_the_host(twins):
    before = twins.quantized.model.diffusion_model.img_in.weight.clone()
    merged = [loras.stock(m, loras.plain_layer()) for m in (twins.quantized, twins.dense)]
    for model in merged:
        sample(model, steps=1)
    ours, theirs = (model.model.diffusion_model.img_in.weight for model in merged)
    assert torch.equal(ours, theirs.to(ours.dtype))
    sample(twins.quantized, steps=1)
    assert torch.equal(twins.quantized.model.diffusion_model.img_in.weight, before)


@pytest.mark.parametrize("adapter", DENSE)
def test_adapters_that_are_no_pair_join_as_dense_differences(twins, adapter):
    made = DENSE[adapter]()
    quantized, dense = (loras.stock(m, made) for m in (twins.quantized, twins.dense))
    expected = sample(dense)
    assert error(expected, sample(twins.dense)) > 0.02
    assert_close(sample(quantized), expected, "host_dense_branch")


def test_two_stacked_loras_add_up(twins):
    def stack(model):
        return loras.stock(loras.stock(model, loras.kohya(), 0.4), loras.diffusers(), -0.3)

    assert_close(sample(stack(twins.quantized)), sample(stack(twins.dense)), "host_twin")


def test_the_same_lora_twice_is_double_strength(twins):
    once = sample(loras.stock(twins.quantized, loras.kohya(), 0.6))
    twice = sample(loras.stock(loras.stock(twins.quantized, loras.kohya(), 0.3), loras.kohya(), 0.3))
    assert_close(twice, once, "host_twin")


def test_removed_is_bit_identical(quantized):
    before = sample(quantized)
    assert not torch.equal(sample(loras.stock(quantized, loras.kohya())), before)
    assert torch.equal(sample(quantized), before)


def test_clones_do_not_see_each_other(twins):
    a, b = loras.stock(twins.quantized, loras.kohya()), loras.stock(twins.quantized, loras.diffusers())
    first = sample(a)
    assert_close(sample(b), sample(loras.stock(twins.dense, loras.diffusers())), "host_twin")
    assert torch.equal(sample(a), first)


def test_our_node_does_what_the_stock_loader_does(twins, tmp_path):
    path = tmp_path / "test.safetensors"
    save_file(loras.diffusers(), path)
    ours, report = apply_lora(twins.quantized, path, 0.8)
    assert report.unmatched == ()
    assert report.layers == len(loras.diffusers()) // 2
    assert torch.equal(sample(ours), sample(loras.stock(twins.quantized, loras.diffusers(), 0.8)))


def test_a_lora_of_another_model_is_refused(quantized, tmp_path):
    path = tmp_path / "sdxl.safetensors"
    save_file({"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match=r"sdxl.safetensors: none of its 1 tensors"):
        apply_lora(quantized, path, 1.0)


def test_no_quantized_weight_is_touched_or_dequantized(twins, monkeypatch):
    from svdquant_nodes.svdquant.adapters import layout
    from svdquant_nodes.svdquant.adapters.operations import quantized_linears

    before = {
        key: (layer.weight._qdata, layer.weight._qdata.clone())
        for key, layer in quantized_linears(twins.quantized.model)
    }
    monkeypatch.setattr(layout.SVDQuantLayout, "dequantize", None)  # calling it would raise
    sample(loras.stock(twins.quantized, loras.kohya()))
    for key, layer in quantized_linears(twins.quantized.model):
        buffer, copy = before[key]
        assert torch.equal(layer.weight._qdata, copy), key
        assert layer.weight._qdata.data_ptr() == buffer.data_ptr(), key
