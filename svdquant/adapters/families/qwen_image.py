"""Qwen-Image, -Edit, -Edit-2509 and their Lightning distillations on ComfyUI's `QwenImageTransformer2DModel`.

The host keeps diffusers' names with q, k and v apart; Nunchaku files fuse them, kitchen files do not.
"""

from __future__ import annotations

from ..family import Family, Layer, Stored, modulation, shares, unsigned

_B = "transformer_blocks.{}."


def _fused(fused: str, names: str) -> tuple[Layer, ...]:
    split = names.split()
    options = shares(_B + fused, len(split))
    return tuple(
        Layer(_B + name, (*option, (Stored(_B + name),))) for name, option in zip(split, options, strict=True)
    )


FAMILY = Family(
    name="Qwen-Image",
    marker=r"transformer_blocks\.\d+\.img_mlp\.net\.0\.proj",
    layers=(
        *_fused("attn.to_qkv", "attn.to_q attn.to_k attn.to_v"),
        *_fused("attn.add_qkv_proj", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
        *(Layer(_B + name, ((Stored(_B + name),),)) for name in ("attn.to_out.0", "attn.to_add_out")),
        *(Layer(_B + name, ((Stored(_B + name),),)) for name in ("img_mlp.net.0.proj", "txt_mlp.net.0.proj")),
        *(Layer(_B + name, ((unsigned(_B + name),),)) for name in ("img_mlp.net.2", "txt_mlp.net.2")),
        *(Layer(_B + name, ((modulation(_B + name, 6),),)) for name in ("img_mod.1", "txt_mod.1")),
    ),
    same=r"(img_in|txt_in|txt_norm|time_text_embed|norm_out|proj_out|transformer_blocks)\..*",
)
