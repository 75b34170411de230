"""Our node reads every naming: what it puts on the 4-bit model is what the host puts on the dense twin.

The host reads ComfyUI's own names; each case is the same LoRA under those and under another trainer's.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_nodes.svdquant.adapters.lora.apply import apply_lora
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.core import tiles
from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import DEMO_INT4, conditioning, error, sample
from svdquant_nodes.tests.tolerances import assert_close

H = loras.HIDDEN


def pair(name, n, k, *, up="lora_B.weight", down="lora_A.weight", rank=4, seed=20):
    b, a = loras._Random(seed, rank).pair(n, k)
    return {f"{name}.{up}": b, f"{name}.{down}": a}


def diffusers(prefix, **spelled):
    names = [("transformer_blocks.0.attn.to_q", H, H), ("transformer_blocks.0.attn.to_v", H, H)]
    names += [("transformer_blocks.0.ff.net.2", H, 4 * H), ("single_transformer_blocks.1.proj_mlp", 4 * H, H)]
    names += [
        ("single_transformer_blocks.0.proj_out", H, 5 * H),
        ("transformer_blocks.0.norm1.linear", 6 * H, H),
    ]
    out = {}
    for seed, (name, n, k) in enumerate(names):
        out |= pair(prefix(name), n, k, seed=seed, **spelled)
    return out


def dotted(prefix):
    return lambda name: prefix + name


def flat(prefix):
    return lambda name: prefix + name.replace(".", "_")


KOHYA = dict(up="lora_up.weight", down="lora_down.weight")
SAME_AS_DIFFUSERS = {
    "peft": diffusers(dotted("base_model.model.")),
    "peft-default": diffusers(
        dotted("base_model.model."), up="lora_B.default.weight", down="lora_A.default.weight"
    ),
    "no-prefix": diffusers(dotted("")),
    "kohya-transformer": diffusers(flat("lora_transformer_"), **KOHYA),
    "kohya-unet": diffusers(flat("lora_unet_"), **KOHYA),
    "old-diffusers": diffusers(dotted("transformer."), up="lora.up.weight", down="lora.down.weight"),
}


def apply(model, tensors, tmp_path, strength=1.0):
    path = tmp_path / "some.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return apply_lora(model, path, strength)


def compare(twins, ours, for_the_host, tmp_path, strength=1.0):
    """Our node with one file, the stock loader with its equivalent."""
    joined, report = apply(twins.quantized, ours, tmp_path, strength)
    assert report.unmatched == ()
    expected = sample(loras.stock(twins.dense, for_the_host, strength))
    assert error(expected, sample(twins.dense)) > 0.005
    assert_close(sample(joined), expected, "host_twin")
    return report


@pytest.mark.parametrize("tensors", SAME_AS_DIFFUSERS.values(), ids=SAME_AS_DIFFUSERS)
def test_diffusers_modules(twins, tensors, tmp_path):
    compare(twins, tensors, diffusers(dotted("transformer.")), tmp_path, 0.8)


def test_xlabs(twins, tmp_path):
    places = [
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv", 3 * H, H),
        ("double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", H, H),
        ("single_blocks.1.processor.qkv_lora", "single_blocks.1.linear1_qkv", 3 * H, H),
        ("single_blocks.0.processor.proj_lora", "single_blocks.0.linear2", H, 5 * H),
    ]
    xlabs, native = {}, {}
    for seed, (theirs, host, n, k) in enumerate(places):
        xlabs |= pair(theirs, n, k, up="up.weight", down="down.weight", seed=seed)
        native |= pair(f"diffusion_model.{host}", n, k, seed=seed)
    assert compare(twins, xlabs, native, tmp_path).naming == "XLabs"


LAST = {
    "diffusers": (
        "transformer.norm_out.linear",
        True,
    ),  # keeps scale before shift, the host shift before scale
    "comfyui": ("diffusion_model.final_layer.adaLN_modulation.1", False),
    "kohya": ("lora_unet_final_layer_adaLN_modulation_1", False),
}


@pytest.mark.parametrize(("module", "swapped"), LAST.values(), ids=LAST)
def test_the_last_layers_modulation(twins, tmp_path, module, swapped):
    """A 16-bit layer: the host merges, and rounds to bf16 again, which the twin does not."""
    host = pair(LAST["comfyui"][0], 2 * H, H)
    up, down = host.values()
    stored = torch.cat(up.chunk(2)[::-1]) if swapped else up
    tails = ("lora_up", "lora_down") if module.startswith("lora_") else ("lora_B", "lora_A")
    ours = {f"{module}.{tail}.weight": t for tail, t in zip(tails, (stored, down), strict=True)}
    joined, report = apply(twins.quantized, ours, tmp_path, 0.8)
    assert (report.layers, report.unmatched) == (1, ())
    expected = sample(loras.stock(twins.dense, host, 0.8))
    assert error(expected, sample(twins.dense)) > 0.005
    assert_close(sample(joined), expected, "host_dense_branch")


def test_bias_differences_of_q_and_v(twins, tmp_path):
    """The host forgets these: it has no name for a part of a bias. So the truth is made by hand."""
    tensors = diffusers(dotted("transformer."))
    bias = {x: torch.randn(H) for x in "qv"}
    tensors |= {f"transformer.transformer_blocks.0.attn.to_{x}.lora_B.bias": b for x, b in bias.items()}
    joined, report = apply(twins.quantized, tensors, tmp_path, 0.5)
    expected = loras.stock(twins.dense, diffusers(dotted("transformer.")), 0.5)
    whole = torch.cat([bias["q"], torch.zeros(H), bias["v"]])
    expected.add_patches({"diffusion_model.double_blocks.0.img_attn.qkv.bias": ("diff", (whole,))}, 0.5)
    assert report.unmatched == ()
    # biases of 4-bit layers stay in their file's bf16, which the host rounds to stochastically
    assert_close(sample(joined), sample(expected), "host_dense_branch")


def control_lora():
    """BFL's control LoRAs: bare names, biases, norm weights, and an input with twice the channels."""
    tensors = pair("img_in", H, 128) | {"img_in.lora_B.bias": torch.randn(H) * 0.1}
    tensors |= pair("double_blocks.0.img_mlp.0", 4 * H, H, seed=2)
    tensors |= {"double_blocks.0.img_attn.norm.key_norm.scale": torch.full((64,), 1.3)}
    return tensors | {"single_blocks.0.norm.key_norm.scale": torch.full((64,), 0.8)}


def control(model):
    """With an image beside the noise, as control models have."""
    beside = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return sample(model, positive=conditioning(3, concat_latent_image=beside), steps=1)


def heads(model):
    return model.model.diffusion_model.single_blocks[0].norm.key_norm.weight.shape


def test_flux_tools_lora_widens_the_input(twins, tmp_path):
    tensors = control_lora()
    for name in [n for n in tensors if n.endswith("norm.scale")]:
        tensors[name] = tensors[name][:1].expand(heads(twins.dense)).clone()
    joined, report = apply(twins.quantized, tensors, tmp_path)
    assert report.unmatched == ()
    theirs = loras.stock(twins.dense, tensors)
    # the 16-bit layers of the 4-bit model round the merged weight to bf16, those of the twin do not
    assert_close(control(joined), control(theirs), "host_dense_branch")
    assert error(control(joined), control(twins.quantized)) > 0.01
    assert joined.model.diffusion_model.img_in.weight.shape == (H, 64)  # and is narrow again


def test_nunchaku_layout(twins, tmp_path):
    """A file of the engine: our branch with a LoRA beside it, packed. What we take out is the LoRA."""
    stored = load_file(DEMO_INT4)
    packed, native = {}, {}
    for name, host, n, k in (
        ("transformer_blocks.0.qkv_proj", "double_blocks.0.img_attn.qkv", 3 * H, H),
        ("transformer_blocks.0.mlp_context_fc2", "double_blocks.0.txt_mlp.2", H, 4 * H),
    ):
        made = pair(host, n, k, up="up", down="down")
        packed |= pack(name, stored, made[f"{host}.down"], made[f"{host}.up"])
        native |= {f"diffusion_model.{host}.lora_B.weight": packed.pop(f"{name}.rounded_up")}
        native |= {f"diffusion_model.{host}.lora_A.weight": packed.pop(f"{name}.rounded_down")}
    report = compare(twins, packed, native, tmp_path, 0.7)
    assert (report.naming, report.rank, report.layers) == ("Nunchaku", 8, 2)


def pack(name, stored, down, up):
    d0, u0 = tiles.untile_down(stored[f"{name}.lora_down"]), tiles.untile_up(stored[f"{name}.lora_up"])
    down, up = down.to(d0.dtype), up.to(d0.dtype)
    joined = (
        tiles.pad_to(torch.cat([d0, down]), (16, 128), 0.0),
        tiles.pad_to(torch.cat([u0, up], 1), (128, 16), 0.0),
    )
    return {
        f"{name}.lora_down": tiles.tile_down(joined[0]),
        f"{name}.lora_up": tiles.tile_up(joined[1]),
        f"{name}.rounded_down": down,
        f"{name}.rounded_up": up,
    }


def test_nunchaku_layout_of_linear1_and_linear2_parts(twins, tmp_path):
    stored = load_file(DEMO_INT4)
    packed, native = {}, {}
    for name, host, n, k, seed in (
        ("mlp_fc1", "proj_mlp", 4 * H, H, 1),
        ("qkv_proj", "attn.to_qkv", 3 * H, H, 2),
    ):
        made = pair("x", n, k, up="up", down="down", seed=seed)
        full = f"single_transformer_blocks.0.{name}"
        packed |= pack(full, stored, made["x.down"], made["x.up"])
        module = (
            "diffusion_model.single_blocks.0.linear1_qkv"
            if name == "qkv_proj"
            else (f"transformer.single_transformer_blocks.0.{host}")
        )
        native |= {f"{module}.lora_B.weight": packed.pop(f"{full}.rounded_up")}
        native |= {f"{module}.lora_A.weight": packed.pop(f"{full}.rounded_down")}
    up, down = loras._Random(3, 4).pair(H, 5 * H)
    up, down = up.bfloat16(), down.bfloat16()
    for name, columns in (("out_proj", slice(0, H)), ("mlp_fc2", slice(H, 5 * H))):
        full = f"single_transformer_blocks.1.{name}"
        packed |= pack(full, stored, down[:, columns], up)
        del packed[f"{full}.rounded_up"], packed[f"{full}.rounded_down"]
    native |= {"diffusion_model.single_blocks.1.linear2.lora_B.weight": up}
    native |= {"diffusion_model.single_blocks.1.linear2.lora_A.weight": down}
    compare(twins, packed, native, tmp_path)


def test_nunchaku_layout_of_modulation(twins, tmp_path):
    up, down = loras._Random(4, 16).pair(6 * H, H)
    interleaved = up.reshape(6, H, 16).transpose(0, 1).reshape(6 * H, 16)
    ours = {
        "transformer_blocks.0.norm1.linear.lora_up": interleaved,
        "transformer_blocks.0.norm1.linear.lora_down": down,
    }
    native = {
        "diffusion_model.double_blocks.0.img_mod.lin.lora_B.weight": up,
        "diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight": down,
    }
    compare(twins, ours, native, tmp_path)


def test_nunchaku_layout_made_on_another_checkpoint(twins, tmp_path):
    stored = load_file(DEMO_INT4)
    name = "transformer_blocks.0.qkv_proj"
    stored[f"{name}.lora_down"] = stored[f"{name}.lora_down"] + 1
    packed = pack(name, stored, *reversed(loras._Random(1, 4).pair(3 * H, H)))
    packed = {n: t for n, t in packed.items() if "rounded" not in n}
    with pytest.raises(
        ValueError, match="holds the branch of another 4-bit checkpoint than svdquant-demo-int4"
    ):
        apply(twins.quantized, packed, tmp_path)
    with pytest.raises(ValueError, match="works on that model only, got a 16-bit one"):
        apply(twins.dense, packed, tmp_path)


def test_report(quantized, tmp_path):
    tensors = diffusers(dotted("transformer.")) | {
        f"lora_unet_x_{i}.lora_up.weight": torch.ones(2) for i in range(12)
    }
    _, report = apply(quantized, tensors, tmp_path, 0.5)
    nbytes = sum(t.nbytes for n, t in tensors.items() if "lora_unet" not in n)
    assert (report.layers, report.rank, report.nbytes, report.dense, report.error) == (6, 24, nbytes, 0, 0.0)
    text = str(report)
    assert text.startswith(
        "some.safetensors at 0.5: LoRA, diffusers naming; 6 layers of 12 tensors, rank 24 in all, 0.1 MB; exact; not of"
    )
    assert text.count("lora_unet") == 10 and text.endswith(" and 2 more")


def test_report_of_what_is_not_a_plain_pair(quantized, tmp_path):
    name = "diffusion_model.single_blocks.{}.linear2"
    noise = torch.randn(H, 5 * H, generator=torch.Generator().manual_seed(1))
    low_rank = noise[:, :8] @ torch.randn(8, 5 * H, generator=torch.Generator().manual_seed(2))
    tensors = {f"{name.format(0)}.diff": low_rank + 1e-3 * noise, f"{name.format(1)}.diff": noise}
    qkv = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors |= {f"{qkv}.lokr_w1": torch.ones(16, 16), f"{qkv}.lokr_w2": torch.ones(3 * H // 16, H // 16)}
    _, report = apply(quantized, tensors, tmp_path)
    assert report.kinds == ("difference", "LoKr")
    assert (report.layers, report.tensors, report.products, report.dense, report.rank) == (3, 4, 1, 1, 8)
    assert 1e-4 < report.error < 1e-3
    assert "1 layers carry a Kronecker product; 1 layers carry a whole difference" in str(report)
    assert f"largest relative error {report.error:.1e}" in str(report)


def test_layers_of_the_report_exist(quantized, tmp_path):
    joined, _ = apply(quantized, diffusers(dotted("")), tmp_path)
    keys = {key for key, _ in quantized_linears(quantized.model)}
    assert set(joined.patches) <= keys
