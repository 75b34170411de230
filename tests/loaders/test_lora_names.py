"""Every trainer's spelling of a LoRA tensor's name leads to the one layer it means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svdquant_nodes.loaders.lora_names import guess_family, guess_other_family, naming, rename, split

FILE = Path("some.safetensors")
KNOWN = {
    "diffusion_model.double_blocks.0.img_attn.qkv": "qkv",
    "lora_unet_double_blocks_0_img_attn_qkv": "qkv",
    "diffusion_model.double_blocks.0.txt_attn.proj": "text out",
    "diffusion_model.single_blocks.1.linear1_qkv": "linear1 qkv",
    "diffusion_model.single_blocks.1.linear2": "linear2",
    "diffusion_model.double_blocks.0.img_attn.norm.key_norm": "key norm",
    "diffusion_model.img_in": "img_in",
    "transformer.transformer_blocks.0.attn.to_q": ("qkv", (0, 0, 4)),
    "lora_transformer_transformer_blocks_0_attn_to_q": ("qkv", (0, 0, 4)),
    "transformer.transformer_blocks.0.attn.to_out.0": "image out",
    "transformer.transformer_blocks.0.attn.norm_k": "key norm",
}
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
Q = "transformer.transformer_blocks.0.attn.to_q"
FLAT_Q = "lora_transformer_transformer_blocks_0_attn_to_q"
SPELLINGS = {
    "diffusers": ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", Q, "lora_down.weight"),
    "no-prefix": ("transformer_blocks.0.attn.to_q.lora_B.weight", Q, "lora_up.weight"),
    "peft": ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", Q, "lora_down.weight"),
    "peft-named": (
        "base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight",
        Q,
        "lora_down.weight",
    ),
    "peft-in-diffusers": (
        "transformer.base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight",
        Q,
        "lora_up.weight",
    ),
    "peft-dora": ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", Q, "dora_scale"),
    "processor": ("transformer_blocks.0.attn.processor.to_q_lora.up.weight", Q, "lora_up.weight"),
    "dotted-lora": ("transformer_blocks.0.attn.to_q.lora.down.weight", Q, "lora_down.weight"),
    "linear-layer": (
        "unet.transformer_blocks.0.attn.to_q.lora_linear_layer.down.weight",
        Q,
        "lora_down.weight",
    ),
    "bare-letters": ("transformer_blocks.0.attn.to_q.lora_A", Q, "lora_down.weight"),
    "kohya-diffusers": (
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight",
        FLAT_Q,
        "lora_up.weight",
    ),
    "kohya-unet-diffusers": ("lora_unet_transformer_blocks_0_attn_to_q.alpha", FLAT_Q, "alpha"),
    "lycoris": ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", FLAT_Q, "lokr_w1"),
    "diffsynth": ("pipe.dit.double_blocks.0.img_attn.qkv.lora_A.default.weight", QKV, "lora_down.weight"),
    "to-out-without-0": (
        "transformer_blocks.0.attn.to_out.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_out.0",
        "lora_down.weight",
    ),
    "kohya": (
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_down.weight",
    ),
    "comfy": (
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "lora_up.weight",
    ),
    "fused-by-nunchaku": (
        "transformer_blocks.0.attn.to_qkv.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "lora_down.weight",
    ),
    "xlabs-image": (
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "lora_down.weight",
    ),
    "xlabs-text": (
        "double_blocks.0.processor.proj_lora2.up.weight",
        "diffusion_model.double_blocks.0.txt_attn.proj",
        "lora_up.weight",
    ),
    "xlabs-single": (
        "single_blocks.1.processor.qkv_lora.down.weight",
        "diffusion_model.single_blocks.1.linear1_qkv",
        "lora_down.weight",
    ),
    "xlabs-single-out": (
        "diffusion_model.single_blocks.1.processor.proj_lora.up.weight",
        "diffusion_model.single_blocks.1.linear2",
        "lora_up.weight",
    ),
    "bfl-bias": ("img_in.lora_B.bias", "diffusion_model.img_in", "diff_b"),
    "bfl-norm": (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "diffusion_model.double_blocks.0.img_attn.norm.key_norm",
        "set_weight",
    ),
    "diffusers-norm": (
        "transformer.transformer_blocks.0.attn.norm_k.weight",
        "transformer.transformer_blocks.0.attn.norm_k",
        "set_weight",
    ),
}
# what else must be there for a tensor of this kind to be accepted
PARTNERS = {"lora_down.weight": "lora_up.weight", "lora_up.weight": "lora_down.weight", "lokr_w1": "lokr_w2"}


def tensor(*shape):
    return torch.ones(*shape or (2, 2))


@pytest.mark.parametrize(("name", "module", "tail"), SPELLINGS.values(), ids=SPELLINGS)
def test_spelling(name, module, tail):
    tensors = {name: tensor()}
    if tail in PARTNERS:
        tensors[f"{module}.{PARTNERS[tail]}"] = tensor()
    elif tail in ("alpha", "dora_scale"):
        tensors |= {f"{module}.{end}": tensor() for end in ("lora_up.weight", "lora_down.weight")}
        tensors[name] = torch.ones(()) if tail == "alpha" else torch.ones(2)
    renamed = rename(FILE, tensors, KNOWN)
    assert renamed.unmatched == ()
    assert tail in renamed.modules[module]
    assert set(renamed.flat()) == {f"{module}.{t}" for t in renamed.modules[module]}


def test_peft_magnitudes_become_a_column():
    down_up = {f"{Q}.lora_A.weight": tensor(), f"{Q}.lora_B.weight": tensor()}
    renamed = rename(FILE, {**down_up, f"{Q}.lora_magnitude_vector": torch.ones(2)}, KNOWN)
    assert renamed.modules[Q]["dora_scale"].shape == (2, 1)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.alpha", "kohya"),
        ("lora_unet_single_transformer_blocks_0_norm_linear.alpha", "kohya on diffusers modules"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("base_model.model.x.lora_A.weight", "PEFT"),
        ("diffusion_model.x.lora_A.weight", "ComfyUI"),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "BFL"),
        ("lycoris_x.lokr_w1", "LyCORIS"),
        ("transformer.x.lora_A.weight", "diffusers"),
    ],
)
def test_naming_is_told(name, label):
    assert naming(name) == label


PAIR = {f"{Q}.lora_A.weight": tensor(), f"{Q}.lora_B.weight": tensor()}
INCOMPLETE = {
    "half-a-pair": (
        {f"{Q}.lora_A.weight": tensor()},
        "lora_A.weight: expected lora_up.weight beside it, got none",
    ),
    "half-a-loha": ({f"{Q}.hada_w1_a": tensor(), f"{Q}.hada_w1_b": tensor()}, "expected hada_w2_a beside it"),
    "one-factor-of-a-lokr": ({f"{Q}.lokr_w1": tensor()}, "expected lokr_w2 beside it"),
    "half-a-factor": ({f"{Q}.lokr_w1_a": tensor(), f"{Q}.lokr_w2": tensor()}, "expected lokr_w1_b beside it"),
    "glora": ({f"{Q}.a1.weight": tensor(), f"{Q}.b1.weight": tensor()}, "expected a2.weight beside it"),
    "twice": (
        {**PAIR, f"{FLAT_Q}.lora_up.weight": tensor()},
        "expected one lora_up.weight for this layer, got also",
    ),
    "two-adapters": (
        {**PAIR, f"{Q}.diff": tensor()},
        "expected one adapter for this layer, got LoRA and difference",
    ),
    "alpha": ({**PAIR, f"{Q}.alpha": torch.ones(3)}, r"expected one number, got shape \[3\]"),
    "oft-of-two-axes": ({f"{Q}.oft_blocks": tensor()}, "expected square blocks on three axes"),
    "rescale-alone": ({f"{Q}.rescale": tensor()}, "expected oft_blocks beside it"),
}


@pytest.mark.parametrize(("tensors", "message"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_is_refused(tensors, message):
    with pytest.raises(ValueError, match=rf"some\.safetensors.*{message}"):
        rename(FILE, tensors, KNOWN)


def test_what_belongs_nowhere_is_listed_as_the_file_has_it():
    strays = {"lora_unet_blocks_3_x.lora_up.weight": tensor(), f"{FLAT_Q}.alpha": torch.ones(())}
    renamed = rename(FILE, strays, KNOWN)
    assert renamed.modules == {}
    assert set(renamed.unmatched) == set(strays)  # an alpha alone is no adapter


@pytest.mark.parametrize(
    "module",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        "lora_prior_te_text_projection",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
        "te1.text_model.encoder.layers.0.mlp.fc1",
        "bundle_emb.dog.clip_g",
    ],
)
def test_text_encoder_tensors_are_counted(module):
    renamed = rename(FILE, {f"{module}.lora_up.weight": tensor(), f"{module}.alpha": torch.ones(())}, KNOWN)
    assert renamed.unmatched == ()
    assert renamed.text_encoder == (f"{module}.lora_up.weight", f"{module}.alpha")


def test_a_boft_gets_the_alpha_that_hosts_need():
    assert float(rename(FILE, {f"{Q}.oft_blocks": torch.ones(1, 2, 2, 2)}, KNOWN).modules[Q]["alpha"]) == 0


def test_no_lora_tensor_has_no_tail():
    assert split("double_blocks.0.img_attn.qkv.weight") == ("double_blocks.0.img_attn.qkv.weight", "")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lora_unet_input_blocks_4_1_proj_in.alpha", "SDXL or Stable Diffusion"),
        ("lora_unet_double_blocks_0_img_attn_qkv.alpha", "FLUX"),
        ("transformer_blocks.0.img_mlp.net.2.lora_A.weight", "Qwen-Image"),
        ("lora_te1_text_model.alpha", "a text encoder only"),
        (
            "unet.up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "SDXL or Stable Diffusion",
        ),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "PixArt"),
        ("lora_unet_blocks_0_cross_attn_kv_linear.alpha", "PixArt"),
        ("blocks.0.self_attn.q.lora_A.default.weight", "Wan"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "Wan"),
        ("lora_unet_layers_12_attention_to_q.alpha", "Z-Image or Lumina"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight", "FLUX.2"),
        ("distilled_guidance_layer.layers.0.linear_1.lora_A.weight", "Chroma"),
        ("transformer_blocks.0.attn.add_k_proj.lora_A.weight", "FLUX or Qwen-Image"),
        ("something.else", ""),
    ],
)
def test_family_is_guessed_for_the_message(name, family):
    assert guess_family([name]) == family


def test_family_is_guessed_from_the_model_part_of_a_file():
    assert guess_family(["lora_te1_text_model.alpha", "lora_unet_input_blocks_4_1_proj_in.alpha"]).startswith(
        "SDXL"
    )


def test_leftovers_of_another_family_are_told_from_those_of_this_one():
    flux = "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight"
    assert guess_other_family([flux], ["transformer_blocks.0.img_mlp.net.2"]) == "FLUX"
    assert guess_other_family([flux], ["lora_unet_single_transformer_blocks_0_proj_out"]) == ""
    assert guess_other_family(["something.else"], []) == ""


SPLIT = {f"diffusion_model.blocks.0.attn.to_{x}": x for x in "qkv"}
FUSED = "blocks.0.attn.to_qkv"
CUT_BY_ROWS = {
    "lora": ("lora_A.weight", "lora_B.weight"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "difference": ("diff",),
}
BY_ROWS = ("lora_up.weight", "diff", "hada_w1_a", "hada_w2_a", "dora_scale")


@pytest.mark.parametrize("tails", CUT_BY_ROWS.values(), ids=CUT_BY_ROWS)
def test_a_fused_layer_is_cut_by_rows(tails):
    tensors = {f"{FUSED}.{tail}": torch.randn(6, 6) for tail in tails}
    tensors |= {f"{FUSED}.alpha": torch.tensor(2.0), f"{FUSED}.dora_scale": torch.rand(6, 1)}
    renamed = rename(FILE, tensors, SPLIT)
    assert list(renamed.modules) == list(SPLIT) and renamed.unmatched == ()
    for name, whole in tensors.items():
        tail = split(name)[1]
        parts = [members[tail] for members in renamed.modules.values()]
        assert torch.equal(torch.cat(parts) if tail in BY_ROWS else parts[0], whole), name


UNCUT = {
    "odd-rows": ({"lora_B.weight": tensor(4, 2)}, "expected rows for 3 parts of one size, got 4"),
    "lokr": ({"lokr_w1": tensor(), "lokr_w2": tensor()}, r"lokr_w1: this model has the layer in 3 parts"),
    "dora-of-columns": (
        {"lora_A.weight": tensor(2, 4), "lora_B.weight": tensor(6, 2), "dora_scale": tensor(1, 4)},
        "dora_scale: this model has the layer in 3 parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), UNCUT.values(), ids=UNCUT)
def test_what_cannot_be_cut_by_rows_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        rename(FILE, {f"{FUSED}.{tail}": t for tail, t in tensors.items()}, SPLIT)


def test_a_fused_layer_with_a_part_that_is_unknown_is_left_over():
    known = {name: layer for name, layer in SPLIT.items() if layer != "v"}
    tensors = {f"{FUSED}.lora_A.weight": tensor(2, 4), f"{FUSED}.lora_B.weight": tensor(6, 2)}
    assert set(rename(FILE, tensors, known).unmatched) == set(tensors)


def test_an_alpha_alone_of_a_fused_layer_is_left_over_once():
    assert rename(FILE, {f"{FUSED}.alpha": torch.ones(())}, SPLIT).unmatched == (f"{FUSED}.alpha",)
