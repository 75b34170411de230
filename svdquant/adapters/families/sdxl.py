"""SDXL and SDXL-Turbo on ComfyUI's `UNetModel`.

Stored names are the diffusers UNet's. The linears of its transformer blocks are quantized, self-attention's q, k and v
fused; convolutions, resnets, embeddings and cross-attention's k and v stay 16-bit.
"""

from __future__ import annotations

import json

from ..family import Family, Layer, Plain, Published, Shapes, Stored, shares

# diffusers' attention blocks and resnets on the host's flat list of blocks
ATTENTIONS = {
    **{f"down_blocks.{b}.attentions.{a}": f"input_blocks.{1 + 3 * b + a}.1" for b in (1, 2) for a in (0, 1)},
    "mid_block.attentions.0": "middle_block.1",
    **{f"up_blocks.{b}.attentions.{a}": f"output_blocks.{3 * b + a}.1" for b in (0, 1) for a in (0, 1, 2)},
}
RESNETS = {
    **{f"down_blocks.{b}.resnets.{r}": f"input_blocks.{1 + 3 * b + r}.0" for b in (0, 1, 2) for r in (0, 1)},
    **{f"mid_block.resnets.{r}": f"middle_block.{2 * r}" for r in (0, 1)},
    **{f"up_blocks.{b}.resnets.{r}": f"output_blocks.{3 * b + r}.0" for b in (0, 1, 2) for r in (0, 1, 2)},
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MODULES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    **{f"down_blocks.{b}.downsamplers.0.conv": f"input_blocks.{3 + 3 * b}.0.op" for b in (0, 1)},
    **{f"up_blocks.{b}.upsamplers.0.conv": f"output_blocks.{3 * b + 2}.2.conv" for b in (0, 1)},
    **{f"{d}.{i}": f"{h}.{o}" for d, h in RESNETS.items() for i, o in _IN_RESNET.items()},
    **{f"{d}.{n}": f"{h}.{n}" for d, h in ATTENTIONS.items() for n in ("norm", "proj_in", "proj_out")},
}
_SIZES = {  # rows and columns of the quantized linears, in widths of their block
    **{f"attn1.to_{x}": (1, 1) for x in "qkv"},
    "attn1.to_qkv": (3, 1),
    "attn1.to_out.0": (1, 1),
    "attn2.to_q": (1, 1),
    "attn2.to_out.0": (1, 1),
    "ff.net.0.proj": (8, 1),
    "ff.net.2": (1, 4),
}
_IN_BLOCK = (
    "norm1",
    "norm2",
    "norm3",
    "attn2.to_k",
    "attn2.to_v",
    *(n for n in _SIZES if n != "attn1.to_qkv"),
)


def _block(stored: str, host: str) -> tuple[Layer, ...]:
    """The quantized linears of one attention block's transformer blocks."""
    stored, host = f"{stored}.transformer_blocks.{{}}.", f"{host}.transformer_blocks.{{}}."
    qkv = zip(("attn1.to_q", "attn1.to_k", "attn1.to_v"), shares(stored + "attn1.to_qkv", 3), strict=True)
    same = ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    return (
        *(Layer(host + name, (*option, (Stored(stored + name),))) for name, option in qkv),
        *(Layer(host + name, ((Stored(stored + name),),)) for name in same),
    )


def _sizes(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """True sizes, which padding hides in a UNet of other widths: cross-attention's k, always dense, has the width."""
    found = {}
    for stored in ATTENTIONS:
        (width, *_) = shapes.get(f"{stored}.transformer_blocks.0.attn2.to_k.weight", (0,))
        if width:
            block = f"{stored}.transformer_blocks.{{}}."
            found |= {block + name: (n * width, k * width) for name, (n, k) in _SIZES.items()}
    return found


def _metadata(shapes: Shapes) -> dict[str, str]:
    """The header of a published file; the diffusers config only for SDXL's own sizes."""
    config = {
        **dict(
            _class_name="UNet2DConditionModel", act_fn="silu", in_channels=4, out_channels=4, sample_size=128
        ),
        **dict(addition_embed_type="text_time", addition_time_embed_dim=256, attention_head_dim=[5, 10, 20]),
        **dict(block_out_channels=[320, 640, 1280], cross_attention_dim=2048, layers_per_block=2),
        **dict(projection_class_embeddings_input_dim=2816, transformer_layers_per_block=[1, 2, 10]),
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "use_linear_projection": True,
    }
    full = shapes.get("middle_block.1.transformer_blocks.9.attn1.to_q.weight") == (1280, 1280)
    return {"model_class": "NunchakuSDXLUNet2DConditionModel"} | (
        {"config": json.dumps(config)} if full else {}
    )


FAMILY = Family(
    name="SDXL",
    marker=r"(down_blocks|mid_block|up_blocks)\..*\.transformer_blocks\.\d+\.(attn[12]\.to_|ff\.net\.).*",
    layers=tuple(layer for stored, host in ATTENTIONS.items() for layer in _block(stored, host)),
    plain=(
        *(Plain(f"{d}.{end}", f"{h}.{end}") for d, h in _MODULES.items() for end in ("weight", "bias")),
        *(
            Plain(f"{d}.transformer_blocks.{{}}.{n}.{end}", f"{h}.transformer_blocks.{{}}.{n}.{end}")
            for d, h in ATTENTIONS.items()
            for n in _IN_BLOCK
            for end in ("weight", "bias")
        ),
    ),
    sizes=_sizes,
    published=Published(host=r"label_emb\.0\.0", metadata=_metadata),
)
