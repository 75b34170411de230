"""LoRA files that do not belong to the model: one sentence, and the model goes on as before."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from svdquant_nodes.svdquant.adapters.lora.apply import apply_lora
from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import DEMO_BF16, DEMO_INT4, sample

H = loras.HIDDEN


def pair(name, n=H, k=H):
    return {f"{name}.lora_B.weight": torch.ones(n, 2), f"{name}.lora_A.weight": torch.ones(2, k)}


QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
REFUSED = {
    "sdxl": (
        {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(2, 2)},
        "none of its 1 tensors.*It looks like a LoRA for SDXL or Stable Diffusion. Choose",
    ),
    "text-encoder-only": (
        pair("lora_te1_text_model"),
        "It looks like a LoRA for a text encoder only. Use ComfyUI's Load LoRA, which takes a CLIP",
    ),
    "sdxl-with-text-encoders": (
        pair("lora_te1_text_model") | pair("lora_unet_down_blocks_1_attentions_0_proj_in"),
        "such as 'lora_unet_.*It looks like a LoRA for SDXL",
    ),
    "deeper-model": (
        pair(QKV, 3 * H) | pair(QKV.replace("0", "5"), 3 * H),
        r"double_blocks\.5\..*expected double_blocks 0 to 0, got 5. The LoRA is for a model with more blocks",
    ),
    "deeper-diffusers": (
        pair("transformer.transformer_blocks.0.attn.to_q")
        | pair("transformer.transformer_blocks.59.attn.to_q"),
        "expected transformer_blocks 0 to 0, got 59",
    ),
    "deeper-kohya": (
        {
            f"lora_unet_single_blocks_{i}_linear1.{t}": x
            for i in (0, 37)
            for t, x in (("lora_up.weight", torch.ones(7 * H, 2)), ("lora_down.weight", torch.ones(2, H)))
        },
        "expected single_blocks 0 to 1, got 37",
    ),
    "wider-model": (pair(QKV, 9216, 3072), rf"{QKV}\.weight: expected \[768, 256\], got \[9216, 3072\]"),
    "one-layer-of-many": (
        pair(QKV, 3 * H) | pair("diffusion_model.txt_in", H, 5),
        r"txt_in\.weight: expected",
    ),
    "narrower-input": (
        pair("diffusion_model.img_in", H, 32),
        r"img_in\.weight: expected \[256, 64\], got \[256, 32\]",
    ),
    "factor-a-vector": (
        pair(QKV, 3 * H) | {f"{QKV}.lora_B.weight": torch.ones(3 * H)},
        r"qkv\.weight: lora_up\.weight: expected a matrix, got shape \[768\]",
    ),
    "rank-0": (
        {f"{QKV}.lora_B.weight": torch.ones(3 * H, 0), f"{QKV}.lora_A.weight": torch.ones(0, H)}
        | {f"{QKV}.alpha": torch.tensor(4.0)},
        r"expected a matrix, got shape \[768, 0\]",
    ),
    "bias": ({f"{QKV}.diff_b": torch.ones(5)}, r"qkv\.bias: expected \[768\], got 5 numbers"),
    "dora": (
        pair(QKV, 3 * H) | {f"{QKV}.dora_scale": torch.ones(5, 1)},
        "expected 768 or 256 DoRA magnitudes, got 5",
    ),
    "oft": ({f"{QKV}.oft_blocks": torch.ones(5, 8, 8)}, "expected 768 rows, got 5 blocks of 8"),
    "boft": (
        {f"{QKV}.oft_blocks": torch.zeros(7, 48, 16, 16)},
        "expected 768 rows, got 7 stages of which the last spans 1024",
    ),
    "glora": (
        {f"{QKV}.{t}.weight": torch.ones(4, 4) for t in ("a1", "a2", "b1", "b2")},
        r"expected GLoRA factors of \[768, 256\]",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(quantized, tmp_path, tensors, message):
    before = sample(quantized, steps=1)
    path = tmp_path / "bad.safetensors"
    save_file({name: t.clone() for name, t in tensors.items()}, path)
    with pytest.raises(ValueError, match=rf"^bad\.safetensors: .*{message}") as caught:
        apply_lora(quantized, path, 1.0)
    assert "\n" not in str(caught.value)
    assert torch.equal(sample(quantized, steps=1), before)
    assert not quantized.patches


@pytest.mark.parametrize("file", [DEMO_BF16, DEMO_INT4], ids=["16-bit", "4-bit"])
def test_a_whole_model_is_no_lora(quantized, file):
    with pytest.raises(ValueError, match="none of a LoRA. Is it a whole model|got a quantized model"):
        apply_lora(quantized, file, 1.0)
