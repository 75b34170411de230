"""What diffusers calls layers of ComfyUI's models, for the families where ComfyUI has no map of its own."""

from __future__ import annotations

import re

# The host's module -> diffusers' module, where the host has no map. Whole names, without the host's prefix.
_WAN = r"((?:vace_)?blocks\.\d+)\."
_DIFFUSERS = tuple(
    (re.compile(host), name)
    for host, name in (
        (_WAN + r"self_attn\.([qkv])", r"\1.attn1.to_\2"),
        (_WAN + r"self_attn\.o", r"\1.attn1.to_out.0"),
        (_WAN + r"cross_attn\.([qkv])", r"\1.attn2.to_\2"),
        (_WAN + r"cross_attn\.([kv])_img", r"\1.attn2.add_\2_proj"),
        (_WAN + r"cross_attn\.o", r"\1.attn2.to_out.0"),
        (_WAN + r"ffn\.0", r"\1.ffn.net.0.proj"),
        (_WAN + r"ffn\.2", r"\1.ffn.net.2"),
        (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"time_projection\.1", "condition_embedder.time_proj"),
        (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
        (r"head\.head", "proj_out"),
        # SDXL
        (r"label_emb\.0\.0", "add_embedding.linear_1"),
        (r"label_emb\.0\.2", "add_embedding.linear_2"),
        # FLUX.2
        (r"((?:double|single)_stream_modulation(?:_img|_txt)?)\.lin", r"\1.linear"),
        (r"time_in\.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
        (r"time_in\.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
        (r"guidance_in\.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
        (r"guidance_in\.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
        # Chroma
        (
            r"distilled_guidance_layer\.layers\.(\d+)\.in_layer",
            r"distilled_guidance_layer.layers.\1.linear_1",
        ),
        (
            r"distilled_guidance_layer\.layers\.(\d+)\.out_layer",
            r"distilled_guidance_layer.layers.\1.linear_2",
        ),
    )
)


def diffusers_names(module: str) -> list[str]:
    """diffusers' names for a host module, both without a prefix."""
    matches = ((pattern.fullmatch(module), spelled) for pattern, spelled in _DIFFUSERS)
    return [match.expand(spelled) for match, spelled in matches if match]
