"""Tiny models published by hand, apart from the tables that read them: every weight arrives in its place."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.tests.inside_host import loras, publishers, small, twins
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.small_models import SMALL, detecting, random_weights
from svdquant_nodes.tests.tolerances import assert_close


@pytest.mark.parametrize("case", publishers.CASES)
def test_every_weight_arrives_in_its_place(case, tmp_path):
    path, (family, *_) = tmp_path / "model.safetensors", publishers.CASES[case]
    source = random_weights(SMALL[family].model())
    publishers.write(case, path, source)
    with detecting():
        check_weights(load_model(path), source)


def check_weights(model, source, linears=None):
    """Every quantized weight and bias is the source's, rounded; every other tensor is the source's own."""
    weights = {key.removeprefix("diffusion_model."): layer for key, layer in quantized_linears(model.model)}
    assert len(weights) == linears or linears is None
    for name, layer in weights.items():
        kept = layer.convert_weight(layer.weight.to(torch.float32))
        assert error(kept, source[name].float()) < 0.13, name  # rounding to 4 bits; a wrong place gives 1.4
        bias = name.removesuffix("weight") + "bias"
        if bias in source:
            restored = layer.convert_bias(layer.bias.float())
            assert (restored - source[bias].float()).abs().max() < 0.02, bias
    for name, tensor in model.model.diffusion_model.state_dict().items():
        if name not in weights and name.removesuffix("bias") + "weight" not in weights:
            assert torch.equal(tensor.float(), source[name].float()), name


def test_lora_on_a_share_of_a_fused_layer(tmp_path):
    path = tmp_path / "sdxl.safetensors"
    publishers.write("sdxl", path, random_weights(SMALL["sdxl"].model()))
    both = twins.make(path)
    generator, name = (
        torch.Generator().manual_seed(3),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_",
    )
    lora = {}
    for x in "qv":  # two thirds of the stored to_qkv
        lora[f"{name}{x}.lora_up.weight"] = torch.randn(320, 4, generator=generator)
        lora[f"{name}{x}.lora_down.weight"] = torch.randn(4, 320, generator=generator) / 320**0.5
    ours, theirs = (small.sample("sdxl", loras.stock(one, lora)) for one in (both.quantized, both.dense))
    assert error(theirs, small.sample("sdxl", both.dense)) > 1e-3
    assert_close(ours, theirs, "host_twin")
