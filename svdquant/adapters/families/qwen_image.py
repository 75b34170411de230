"""Qwen-Image, -Edit (2509, 2511, Layered) and their Lightning distillations on ComfyUI's `QwenImageTransformer2DModel`.

The host keeps diffusers' names with q, k and v apart; Nunchaku files fuse them, kitchen files do not. An empty tensor
`__index_timestep_zero__` is how files of Edit-2511 say that they are.
"""

from __future__ import annotations

import json

from ..family import Family, Layer, Published, Shapes, Stored, modulation, shares, unsigned

_B = "transformer_blocks.{}."


def _fused(fused: str, names: str) -> tuple[Layer, ...]:
    split = names.split()
    options = shares(_B + fused, len(split))
    return tuple(
        Layer(_B + name, (*option, (Stored(_B + name),))) for name, option in zip(split, options, strict=True)
    )


def _metadata(shapes: Shapes) -> dict[str, str]:
    """The header of a published file, with this model's sizes."""
    width, channels = shapes["img_in.weight"]
    config = {
        **dict(
            _class_name="QwenImageTransformer2DModel", attention_head_dim=128, axes_dims_rope=[16, 56, 56]
        ),
        **dict(guidance_embeds=False, in_channels=channels, joint_attention_dim=shapes["txt_in.weight"][1]),
        **dict(
            num_attention_heads=width // 128, out_channels=shapes["proj_out.weight"][0] // 4, patch_size=2
        ),
        "num_layers": len({n.split(".")[1] for n in shapes if n.startswith("transformer_blocks.")}),
    }
    return {"model_class": "NunchakuQwenImageTransformer2DModel", "config": json.dumps(config)}


FAMILY = Family(
    name="Qwen-Image",
    marker=r"transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\..*",
    layers=(
        *_fused("attn.to_qkv", "attn.to_q attn.to_k attn.to_v"),
        *_fused("attn.add_qkv_proj", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
        *(Layer(_B + name, ((Stored(_B + name),),)) for name in ("attn.to_out.0", "attn.to_add_out")),
        *(Layer(_B + name, ((Stored(_B + name),),)) for name in ("img_mlp.net.0.proj", "txt_mlp.net.0.proj")),
        *(Layer(_B + name, ((unsigned(_B + name),),)) for name in ("img_mlp.net.2", "txt_mlp.net.2")),
        *(Layer(_B + name, ((modulation(_B + name, 6),),)) for name in ("img_mod.1", "txt_mod.1")),
    ),
    same=r"((img_in|txt_in|txt_norm|time_text_embed|norm_out|proj_out|transformer_blocks)\..*|__index_timestep_zero__)",
    published=Published(host=r"transformer_blocks\.\d+\.img_mlp\.net\.0\.proj", metadata=_metadata),
)
