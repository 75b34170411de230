"""Text encoders are known by names of their tensors, in 16 bits and in 4, whatever lies beside them."""

from __future__ import annotations

import pytest

from svdquant_nodes.loaders.encoders import recognise

BLOCK, DECODER = "encoder.block.0.layer.", "model.layers.0."
NORM = f"{DECODER}post_attention_layernorm.weight"
QUERY_NORM, POST = f"{DECODER}self_attn.q_norm.weight", f"{DECODER}post_feedforward_layernorm.weight"
Q = f"{DECODER}self_attn.q_proj"
LANGUAGE = "model.language_model.layers.0.self_attn."
CASES = {
    "clip-l": ("CLIP-L", ["text_model.encoder.layers.0.mlp.fc1.weight"]),
    "clip-l-openai": ("CLIP-L", ["transformer.resblocks.0.ln_1.weight"]),
    "clip-g-has-the-layers-of-clip-l": ("CLIP-G", [f"text_model.encoder.layers.{i}.mlp.fc1.bias" for i in range(32)]),
    "t5": ("T5", [f"{BLOCK}0.SelfAttention.q.weight", f"{BLOCK}1.DenseReluDense.wi_0.weight"]),
    "t5-in-4-bits": ("T5", [f"{BLOCK}0.SelfAttention.q.qweight", f"{BLOCK}1.DenseReluDense.wi_0.qweight"]),
    "t5-1.0": ("T5 1.0", [f"{BLOCK}0.SelfAttention.q.weight", f"{BLOCK}1.DenseReluDense.wi.weight"]),
    "umt5": (
        "UMT5",
        [f"{BLOCK}0.SelfAttention.q.nibbles", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"],
    ),
    "qwen3": ("Qwen3", [NORM, QUERY_NORM, f"{Q}.weight"]),
    "qwen3-in-4-bits": ("Qwen3", [NORM, QUERY_NORM, f"{Q}.nibbles"]),
    "qwen2.5-vl": ("Qwen2.5-VL", [NORM, f"{DECODER}self_attn.k_proj.bias", "visual.blocks.0.norm1.weight"]),
    "qwen3-vl": ("Qwen3-VL", [f"{LANGUAGE}q_norm.weight", "model.visual.deepstack_merger_list.0.norm.weight"]),
    "gemma-2": ("Gemma 2", [NORM, POST]),
    "gemma-3": ("Gemma 3", [NORM, POST, QUERY_NORM]),
    "gemma-4": ("Gemma 4", [NORM, POST, QUERY_NORM, f"{DECODER}layer_scalar"]),
    "llama": ("Llama 3.1", [NORM, f"{Q}.weight"]),
    "mistral-brings-its-tokenizer": ("Mistral", ["tekken_model", NORM, f"{Q}.weight"]),
    "qwen3.5": (None, ["model.language_model.layers.0.linear_attn.A_log", f"{LANGUAGE}q_norm.weight"]),
    "flux": (None, ["double_blocks.0.img_attn.qkv.weight"]),
    "lumina": (None, ["layers.0.attention.qkv.weight", "cap_embedder.0.weight"]),
    "vae": (None, ["encoder.conv_in.weight", "decoder.conv_in.weight"]),
    "nothing": (None, []),
}  # fmt: skip


@pytest.mark.parametrize(("name", "tensors"), CASES.values(), ids=CASES)
def test_known_by_its_names(name, tensors):
    found = recognise(tensors)
    assert (found and found.name) == name
