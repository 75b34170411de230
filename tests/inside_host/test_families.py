"""Family tables against ComfyUI's own maps of diffusers names, and against the tensors its classes want."""

from __future__ import annotations

import re

import comfy.ops
import comfy.utils
import pytest
import torch

from svdquant_nodes.svdquant.adapters import families
from svdquant_nodes.svdquant.adapters.families import flux, qwen_image, sdxl, z_image
from svdquant_nodes.svdquant.adapters.family import Names

META = {"device": "meta", "operations": comfy.ops.disable_weight_init}


def checkpoint(layers, plain=()):
    return Names(dict.fromkeys(layers), dict.fromkeys(plain))


def split_names(names, is_linear):
    """Tensor names of a 16-bit model as (layers to quantize, tensors that stay)."""
    layers = {n.removesuffix(".weight") for n in names if n.endswith(".weight") and is_linear(n)}
    plain = [n for n in names if n.rpartition(".")[0] not in layers]
    return layers, plain


def host_tensors(mapped, biases):
    """Every host tensor a mapping fills: plain ones, the linears' weights, and the biases that the model has."""
    linears = {f"{host}.weight" for host in mapped.linears} | {f"{host}.bias" for host in mapped.linears}
    filled = {name for name in linears if name.endswith(".weight") or name in biases} | set(mapped.plain)
    return {n.removesuffix(".scale") + ".weight" if n.endswith("_norm.scale") else n for n in filled}


def check_against_host_map(family, layers, plain, host_map):
    """Our place for every diffusers name is the host's: the same tensor, and the same rows of a fused one."""
    mapped = family.map_names(checkpoint(layers, plain))
    assert mapped.left_over == ()
    for host, pieces in mapped.linears.items():
        for name, _ in pieces:
            theirs = host_map[f"{name}.weight"]
            expected = theirs[0] if isinstance(theirs, tuple) else theirs
            assert expected == f"{host}.weight", name
        starts = [host_map[f"{name}.weight"][1][1] for name, _ in pieces] if len(pieces) > 1 else [0]
        assert starts == sorted(starts), f"{host}: the host lays its pieces in another order"
    for host, source in mapped.plain.items():
        (name,) = source.names
        theirs = host_map[name]
        key = theirs[0] if isinstance(theirs, tuple) else theirs
        assert key.replace("_norm.weight", "_norm.scale") == host.replace("_norm.weight", "_norm.scale"), name


def test_flux_agrees_with_the_hosts_map():
    config = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 3072}
    other = re.compile(r".*\.linear_(in|out)\..*|controlnet_.*|single.*\.attn\.to_(qkv_mlp_proj|out)\..*")
    host_map = {  # without what other models and LoRA trainers call the same layers
        name: to for name, to in comfy.utils.flux_to_diffusers(config).items() if not other.fullmatch(name)
    }
    layers, plain = split_names(host_map, lambda n: "_blocks." in n and ".norm_" not in n)
    check_against_host_map(flux.FAMILY, layers, plain, host_map)


@pytest.mark.parametrize("refiners", ["quantized", "dense"])
def test_z_image_names_fill_every_tensor_of_the_hosts_class(refiners):
    from comfy.ldm.lumina.model import NextDiT

    try:
        model = NextDiT(
            patch_size=2, in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            axes_dims=[32, 48, 48], axes_lens=[8, 8, 8], qk_norm=True, cap_feat_dim=64, z_image_modulation=True,
            pad_tokens_multiple=32, **META,
        )  # fmt: skip
    except TypeError as error:
        pytest.skip(f"this ComfyUI's class is older: {error}")
    wanted = set(model.state_dict())
    quantized = ["layers.0", "layers.1"]
    refiner = ["noise_refiner.0", "context_refiner.0"]
    quantized += refiner if refiners == "quantized" else []
    layers = [f"{b}.{n}" for b in quantized for n in ("attention.to_qkv", "attention.to_out.0")]
    layers += [f"{b}.feed_forward.net.{n}" for b in quantized for n in ("0.proj", "2")]
    plain = _z_image_plain(wanted, quantized)
    family = families.resolve(checkpoint(layers, plain))
    assert family is z_image.FAMILY
    mapped = family.map_names(checkpoint(layers, plain))
    assert mapped.left_over == ()
    assert host_tensors(mapped, wanted) == wanted
    w3, w1 = (mapped.linears[f"layers.0.feed_forward.{w}"][0][1].share for w in ("w3", "w1"))
    assert (w3, w1) == ((0, 2), (1, 2)), "the stored linear is value (w3) before gate (w1)"
    if refiners == "dense":
        stored = torch.arange(8.0).reshape(4, 2)
        halves = [mapped.plain[f"noise_refiner.0.feed_forward.{w}.weight"] for w in ("w3", "w1")]
        read = [half.read({half.names[0]: stored}) for half in halves]
        assert torch.equal(torch.cat(read), stored)
        qkv = mapped.plain["context_refiner.0.attention.qkv.weight"]
        assert qkv.names == tuple(f"context_refiner.0.attention.to_{x}.weight" for x in "qkv")


def _z_image_plain(wanted, quantized):
    """Published names of everything that is not quantized; dense blocks keep q, k, v apart and w3, w1 together."""
    renamed = {
        "attention.q_norm": "attention.norm_q",
        "attention.k_norm": "attention.norm_k",
        "attention.out.": "attention.to_out.0.",
        "feed_forward.w2": "feed_forward.net.2",
        "feed_forward.w3": "feed_forward.net.0.proj",
        "attention.qkv": "attention.to_q",
        "x_embedder.": "all_x_embedder.2-1.",
        "final_layer.": "all_final_layer.2-1.",
    }
    plain = set()
    for name in wanted:
        block = ".".join(name.split(".")[:2])
        inner = name.removeprefix(f"{block}.")
        if block in quantized and (inner.startswith("feed_forward") or inner.split(".")[1] in ("qkv", "out")):
            continue
        if inner.startswith("feed_forward.w1"):
            continue
        for ours, theirs in renamed.items():
            if name.startswith(ours) or inner.startswith(ours):
                name = name.replace(ours, theirs)
        plain |= {name.replace("to_q", f"to_{x}") for x in "qkv"} if "attention.to_q" in name else {name}
    return plain


def test_qwen_image_names_fill_every_tensor_of_the_hosts_class():
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(num_layers=2, num_attention_heads=2, joint_attention_dim=64, **META)
    wanted = set(model.state_dict())
    blocks = [f"transformer_blocks.{i}." for i in range(2)]
    names = ["img_mod.1", "txt_mod.1", "attn.to_qkv", "attn.add_qkv_proj", "attn.to_out.0", "attn.to_add_out"]
    names += [f"{s}_mlp.net.{n}" for s in ("img", "txt") for n in ("0.proj", "2")]
    quantized = {b + n for b in blocks for n in names}
    fused = {f"{b}attn.{p}{x}{e}" for b in blocks for p, e in (("to_", ""), ("add_", "_proj")) for x in "qkv"}
    plain = [n for n in wanted if n.rpartition(".")[0] not in quantized | fused]
    made = checkpoint(quantized, plain)
    assert families.resolve(made) is qwen_image.FAMILY
    mapped = qwen_image.FAMILY.map_names(made)
    assert mapped.left_over == ()
    assert host_tensors(mapped, wanted) == wanted
    shares = [mapped.linears[f"transformer_blocks.1.attn.to_{x}"][0][1].share for x in "qkv"]
    assert shares == [(0, 3), (1, 3), (2, 3)]
    unsigned = {name for name, role in qwen_image.FAMILY.roles(made).items() if role.act_shift}
    assert unsigned == {f"{b}{s}_mlp.net.2" for b in blocks for s in ("img", "txt")}


def test_sdxl_agrees_with_the_hosts_map():
    config = {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    }
    host_map = comfy.utils.unet_to_diffusers(config)
    host_map |= {  # SDXL's own, which the host's map of all UNets leaves to its LoRA code
        f"add_embedding.linear_{i}.{e}": f"label_emb.0.{o}.{e}"
        for i, o in ((1, 0), (2, 2))
        for e in ("weight", "bias")
    }
    quantized = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")
    ends = tuple(f".{n}.weight" for n in (*quantized, "ff.net.0.proj", "ff.net.2"))
    layers, plain = split_names(host_map, lambda n: n.endswith(ends))
    absent = (
        "class_embedding",
        "down_blocks.2.downsamplers",
        "up_blocks.2.upsamplers",
    )  # the map's, not SDXL's
    plain = [n for n in plain if not n.startswith(absent)]
    assert families.resolve(checkpoint(layers, plain)) is sdxl.FAMILY
    check_against_host_map(sdxl.FAMILY, layers, plain, host_map)


def test_sdxl_fused_q_k_v_share_one_stored_linear():
    block = "down_blocks.2.attentions.1.transformer_blocks.3."
    names = ("attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    mapped = sdxl.FAMILY.map_names(checkpoint([block + n for n in names]))
    host = "input_blocks.8.1.transformer_blocks.3.attn1.to_"
    assert [mapped.linears[host + x][0] for x in "qkv"] == [
        (block + "attn1.to_qkv", families.Role(share=(i, 3))) for i in range(3)
    ]
