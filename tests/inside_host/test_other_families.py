"""Qwen-Image and SDXL: a small model in its family's published names loads, samples and keeps its weights' places."""

from __future__ import annotations

import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch

from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.tests.inside_host import loras, published, twins
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.tolerances import assert_close

SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 0, 0, 1, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_checkpoint": False,
}


def publish_sdxl(folder):
    """(16-bit state dict in host names, path of the 4-bit file in diffusers names)."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    def lists():
        return {k: list(v) if isinstance(v, list) else v for k, v in SDXL.items()}

    source = published.random_weights(UNetModel(**lists(), **published.META))
    names = {host: diffusers for diffusers, host in comfy.utils.unet_to_diffusers(lists()).items()}
    names |= {
        f"label_emb.0.{o}.{e}": f"add_embedding.linear_{i}.{e}"
        for i, o in ((1, 0), (2, 2))
        for e in ("weight", "bias")
    }
    tensors = {names[name]: t for name, t in source.items()}
    layers = {}
    for block in {n.partition(".attn1.")[0] for n in tensors if ".attn1." in n}:
        q, k, v = (tensors.pop(f"{block}.attn1.to_{x}.weight") for x in "qkv")
        layers[f"{block}.attn1.to_qkv"] = published.four_bit(torch.cat((q, k, v)), None)
        for name in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            bias = tensors.pop(f"{block}.{name}.bias", None)
            layers[f"{block}.{name}"] = published.four_bit(tensors.pop(f"{block}.{name}.weight"), bias)
    published.write(folder / "sdxl.safetensors", layers, tensors)
    return source, folder / "sdxl.safetensors"


def publish_qwen(folder):
    """One block of Qwen-Image, whose width the host fixes."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    source = published.random_weights(QwenImageTransformer2DModel(num_layers=1, **published.META))
    tensors, layers, b = dict(source), {}, "transformer_blocks.0."

    def take(name):
        return tensors.pop(f"{b}{name}.weight"), tensors.pop(f"{b}{name}.bias")

    for fused, parts in (("to_qkv", "to_q to_k to_v"), ("add_qkv_proj", "add_q_proj add_k_proj add_v_proj")):
        weights, biases = zip(*(take(f"attn.{part}") for part in parts.split()), strict=True)
        layers[f"{b}attn.{fused}"] = published.four_bit(torch.cat(weights), torch.cat(biases))
    for name in ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"):
        layers[b + name] = published.four_bit(*take(name))
    for name in ("img_mlp.net.2", "txt_mlp.net.2"):
        layers[b + name] = published.four_bit_unsigned(*take(name))
    for name in ("img_mod.1", "txt_mod.1"):
        layers[b + name] = published.four_bit_modulation(*take(name), 6)
    published.write(folder / "qwen.safetensors", layers, tensors)
    return source, folder / "qwen.safetensors"


def sample(model, width, pooled, latent):
    generator = torch.Generator().manual_seed(1)
    conditioning = [[torch.randn(1, 8, width, generator=generator), {}]]
    if pooled:
        conditioning[0][1]["pooled_output"] = torch.randn(1, pooled, generator=generator)
    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(
        model, noise, 2, 2.0, "euler", "simple", conditioning, conditioning, latent, seed=0, disable_pbar=True
    )


CASES = {  # how to publish it; width of its text, pooled width, an empty latent
    "sdxl": (publish_sdxl, 2048, 1280, torch.zeros(2, 4, 8, 8)),
    "qwen-image": (publish_qwen, 3584, 0, torch.zeros(1, 16, 1, 8, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_published_names_and_layouts_load_onto_the_hosts_class(family, tmp_path):
    publish, width, pooled, latent = CASES[family]
    source, path = publish(tmp_path)
    model = load_model(path)
    weights = {key.removeprefix("diffusion_model."): layer for key, layer in quantized_linears(model.model)}
    assert weights
    for name, layer in weights.items():
        kept = layer.convert_weight(layer.weight.to(torch.float32))
        assert error(kept, source[name].float()) < 0.13, (
            name
        )  # 4-bit rounding of a Gaussian; a wrong place gives 1.4
        bias = name.removesuffix("weight") + "bias"
        if bias in source:
            restored = layer.convert_bias(layer.bias.float())
            assert (restored - source[bias].float()).abs().max() < 0.02, bias
    for name, tensor in model.model.diffusion_model.state_dict().items():
        if name not in weights and name.removesuffix("bias") + "weight" not in weights:
            assert torch.equal(tensor.float(), source[name].float()), name
    reference = comfy.sd.load_diffusion_model_state_dict(source)
    ours, theirs = (sample(m, width, pooled, latent) for m in (model, reference))
    assert torch.isfinite(ours).all()
    assert (
        error(ours, theirs) < 0.35
    )  # no branch, no smoothing: plain W4A4 of random weights through two steps


def test_lora_on_a_share_of_a_fused_layer(tmp_path):
    _, path = publish_sdxl(tmp_path)
    models = twins.make(path)
    generator, name = (
        torch.Generator().manual_seed(3),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_",
    )
    lora = {}
    for x in "qv":  # two thirds of the stored to_qkv
        lora[f"{name}{x}.lora_up.weight"] = torch.randn(320, 4, generator=generator)
        lora[f"{name}{x}.lora_down.weight"] = torch.randn(4, 320, generator=generator) / 320**0.5
    shapes = CASES["sdxl"][1:]
    ours, theirs = (sample(loras.stock(model, lora), *shapes) for model in (models.quantized, models.dense))
    plain = sample(models.dense, *shapes)
    assert error(theirs, plain) > 1e-3
    assert_close(ours, theirs, "host_twin")
