"""Every family and every trainer's naming: a LoRA on the 4-bit model is the exact difference on the dense one.

The oracle knows nothing of the code: which rows of which layer a file's module means is written here by hand, and the
difference is added to the dense twin's weights in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file

from svdquant_nodes.svdquant.adapters.lora.apply import apply_lora
from svdquant_nodes.tests.inside_host import loras, small
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.tolerances import assert_close

STRENGTH, RANK, ALPHA = 0.8, 4, 2.0

# The host's layers, whole.
HOST = {
    "sdxl": (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.7.1.transformer_blocks.1.ff.net.2",
        "middle_block.1.transformer_blocks.0.attn2.to_out.0",
        "output_blocks.2.1.transformer_blocks.0.ff.net.0.proj",
    ),
    "pixart-sigma": ("blocks.0.attn.qkv", "blocks.0.cross_attn.kv_linear", "blocks.0.mlp.fc2"),
    "qwen-image": (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_v_proj",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.1.img_mlp.net.0.proj",
    ),
    "z-image": ("layers.0.attention.qkv", "layers.1.attention.out", "layers.0.feed_forward.w3"),
    "chroma": ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear1"),
    "flux2": ("double_blocks.0.txt_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear2"),
    "wan": ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.2"),
}
# diffusers' layers: the host's layer that each is, or the rows of it (first, count).
DIFFUSERS = {
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": HOST["sdxl"][0],
        "down_blocks.2.attentions.0.transformer_blocks.1.ff.net.2": HOST["sdxl"][1],
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": HOST["sdxl"][2],
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj": HOST["sdxl"][3],
    },
    "pixart-sigma": {
        "transformer_blocks.0.attn1.to_q": ("blocks.0.attn.qkv", 0, 1152),
        "transformer_blocks.0.attn1.to_v": ("blocks.0.attn.qkv", 2304, 1152),
        "transformer_blocks.0.attn2.to_v": ("blocks.0.cross_attn.kv_linear", 1152, 1152),
        "transformer_blocks.0.attn2.to_out.0": "blocks.0.cross_attn.proj",
        "transformer_blocks.0.ff.net.0.proj": "blocks.0.mlp.fc1",
    },
    "qwen-image": {name: name for name in HOST["qwen-image"]},
    "z-image": {
        "layers.0.attention.to_q": ("layers.0.attention.qkv", 0, 256),
        "layers.0.attention.to_v": ("layers.0.attention.qkv", 512, 256),
        "noise_refiner.0.attention.to_k": ("noise_refiner.0.attention.qkv", 256, 256),
        "layers.1.attention.to_out.0": "layers.1.attention.out",
        "layers.0.feed_forward.w1": "layers.0.feed_forward.w1",
        "layers.0.feed_forward.w3": "layers.0.feed_forward.w3",
    },
    "chroma": {
        "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", 256, 256),
        "transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.txt_attn.qkv", 0, 256),
        "transformer_blocks.0.ff.net.0.proj": "double_blocks.0.img_mlp.0",
        "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 512, 256),
        "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 768, 1024),
        "single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
    },
    "flux2": {
        "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", 0, 256),
        "transformer_blocks.0.ff.linear_in": "double_blocks.0.img_mlp.0",
        "transformer_blocks.0.ff_context.linear_out": "double_blocks.0.txt_mlp.2",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "single_blocks.0.linear1",
        "single_transformer_blocks.0.attn.to_out": "single_blocks.0.linear2",
    },
    "wan": {
        "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
        "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
        "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
        "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
        "blocks.0.ffn.net.2": "blocks.0.ffn.2",
    },
}
# Layers that stay 16-bit, in diffusers' names.
SIXTEEN_BIT = {
    "sdxl": {
        "add_embedding.linear_1": "label_emb.0.0",
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    },
    "z-image": {"layers.0.adaLN_modulation.0": "layers.0.adaLN_modulation.0"},
    "chroma": {"distilled_guidance_layer.layers.1.linear_1": "distilled_guidance_layer.layers.1.in_layer"},
    "flux2": {"double_stream_modulation_img.linear": "double_stream_modulation_img.lin"},
    "wan": {"condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head"},
}


@dataclass(frozen=True)
class Naming:
    """How a trainer spells a module and a pair, and the families whose files of that kind the stock loader reads."""

    prefix: str
    diffusers: bool
    up: str
    down: str
    alpha: bool = False
    flat: bool = False
    stock: tuple[str, ...] = ()

    def module(self, name: str) -> str:
        return self.prefix + (name.replace(".", "_") if self.flat else name)


ALL, FLUXES = tuple(HOST), ("chroma", "flux2")
KOHYA = dict(up="lora_up.weight", down="lora_down.weight", alpha=True)
PEFT = dict(up="lora_B.weight", down="lora_A.weight")
NAMED = dict(up="lora_B.default.weight", down="lora_A.default.weight")
NAMINGS = {
    "kohya": Naming("lora_unet_", False, **KOHYA, flat=True, stock=ALL),
    "comfyui": Naming("diffusion_model.", False, **PEFT, stock=ALL),
    "diffsynth": Naming("pipe.dit.", False, **NAMED),
    "diffusers": Naming(
        "transformer.", True, **PEFT, stock=("pixart-sigma", "qwen-image", "z-image", *FLUXES)
    ),
    "diffusers-unet": Naming("unet.", True, **PEFT),
    "peft": Naming("base_model.model.", True, **PEFT, stock=("pixart-sigma",)),
    "lightning": Naming("", True, **KOHYA, stock=("qwen-image", "z-image", *FLUXES)),
    "kohya-diffusers": Naming("lora_unet_", True, **KOHYA, flat=True, stock=("sdxl", "qwen-image")),
    "onetrainer": Naming("lora_transformer_", True, **KOHYA, flat=True, stock=FLUXES),
    "simpletuner": Naming(
        "lycoris_", True, **KOHYA, flat=True, stock=("sdxl", "qwen-image", "z-image", *FLUXES)
    ),
}


@cache
def twins_of(family):
    """The family's twins, and what each makes without a LoRA."""
    with TemporaryDirectory() as folder:
        made = small.make(family, Path(folder))
    return made, small.sample(family, made.quantized), small.sample(family, made.dense)


def weight_of(dense, host):
    return dense.model.get_parameter(f"diffusion_model.{host}.weight")


def places_of(naming, family):
    """module of the file -> (host layer, first row, rows or None)."""
    named = DIFFUSERS[family] if naming.diffusers else {name: name for name in HOST[family]}
    return {name: (at, 0, None) if isinstance(at, str) else at for name, at in named.items()}


def lora_and_truth(naming, places, dense):
    """The file's tensors, and the host's weights with the difference added in float64."""
    random, tensors, truth = loras._Random(11, RANK), {}, {}
    for name, (host, first, count) in places.items():
        shape = weight_of(dense, host).shape
        rows = slice(first, first + count if count else shape[0])
        up, down = random.pair(rows.stop - rows.start, shape[1:].numel())
        module = naming.module(name)
        kernel = shape[1:] if len(shape) > 2 else down.shape[1:]
        tensors[f"{module}.{naming.up}"] = up.reshape(*up.shape, *[1] * (len(shape) - 2))
        tensors[f"{module}.{naming.down}"] = down.reshape(RANK, *kernel)
        if naming.alpha:
            tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
        scale = STRENGTH * (ALPHA / RANK if naming.alpha else 1.0)
        weight = truth.setdefault(host, weight_of(dense, host).double().clone())
        weight[rows] += scale * (up.double() @ down.double()).reshape(-1, *shape[1:])
    return tensors, truth


def with_weights(dense, truth):
    """The dense model with some weights replaced."""
    clone = dense.clone()
    patches = {f"diffusion_model.{host}.weight": ("set", (weight.float(),)) for host, weight in truth.items()}
    assert set(clone.add_patches(patches, 1.0)) == set(patches)
    return clone


def written(folder, tensors):
    path = folder / "some.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("family", HOST)
def test_a_lora_is_its_exact_difference(family, naming, tmp_path):
    (model, _, bare), naming = twins_of(family), NAMINGS[naming]
    places = places_of(naming, family)
    tensors, truth = lora_and_truth(naming, places, model.dense)
    expected = small.sample(family, with_weights(model.dense, truth))
    assert error(expected, bare) > 1e-3
    joined, report = apply_lora(model.quantized, written(tmp_path, tensors), STRENGTH)
    assert (report.layers, report.unmatched, report.error) == (len(places), (), 0.0)
    assert_close(small.sample(family, joined), expected, "host_twin")
    if family in naming.stock:
        stock = loras.stock(model.quantized, tensors, STRENGTH)
        assert_close(small.sample(family, stock), expected, "host_twin")


@pytest.mark.parametrize("family", SIXTEEN_BIT)
def test_layers_that_stay_16_bit(family, tmp_path):
    """Their weights are rounded to bf16 again when the host merges the difference; the twin's are not."""
    (model, _, bare), naming = twins_of(family), NAMINGS["diffusers"]
    places = {name: (host, 0, None) for name, host in SIXTEEN_BIT[family].items()}
    tensors, truth = lora_and_truth(naming, places, model.dense)
    expected = small.sample(family, with_weights(model.dense, truth))
    assert error(expected, bare) > 0.01
    joined, report = apply_lora(model.quantized, written(tmp_path, tensors), STRENGTH)
    assert (report.layers, report.unmatched) == (len(places), ())
    assert_close(small.sample(family, joined), expected, "host_dense_branch")


# A LoRA of the first family fits some layers of the second by name and shape, as FLUX.1's do on Chroma.
RELATED = {("chroma", "flux2"), ("flux2", "chroma")}


PAIRS = [(a, b) for a in HOST for b in HOST if a != b and (b, a) not in RELATED]


@pytest.mark.parametrize(("family", "other"), PAIRS, ids=[f"{b}-on-{a}" for a, b in PAIRS])
def test_a_lora_of_another_family_is_refused(family, other, tmp_path):
    model, before, _ = twins_of(family)
    for naming in (NAMINGS["kohya"], NAMINGS["diffusers"]):
        tensors, _ = lora_and_truth(naming, places_of(naming, other), twins_of(other)[0].dense)
        with pytest.raises(ValueError, match=r"^some\.safetensors: ") as caught:
            apply_lora(model.quantized, written(tmp_path, tensors), 1.0)
        assert "\n" not in str(caught.value)
        assert not model.quantized.patches
    assert torch.equal(small.sample(family, model.quantized), before)


TEXT_ENCODERS = {
    "kohya": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_projection"),
    "diffusers": ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_projection"),
    "comfyui": ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",),
    "onetrainer": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "bundle_emb.dog.clip_l"),
}


@pytest.mark.parametrize("modules", TEXT_ENCODERS.values(), ids=TEXT_ENCODERS)
def test_text_encoder_tensors_are_counted(modules, tmp_path):
    (model, *_), naming = twins_of("sdxl"), NAMINGS["kohya"]
    tensors, _ = lora_and_truth(naming, places_of(naming, "sdxl"), model.dense)
    for module in modules:
        tensors |= {
            f"{module}.lora_up.weight": torch.ones(4, 2),
            f"{module}.lora_down.weight": torch.ones(2, 4),
        }
    _, report = apply_lora(model.quantized, written(tmp_path, tensors), 1.0)
    assert (report.layers, report.unmatched, report.for_clip) == (4, (), 2 * len(modules))
    assert str(report).endswith(
        f"; {2 * len(modules)} tensors are for the text encoder: ComfyUI's Load LoRA puts them on a CLIP"
    )
