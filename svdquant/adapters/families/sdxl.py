"""SDXL and SDXL-Turbo on ComfyUI's `UNetModel`.

Stored names are the diffusers UNet's. The linears of its transformer blocks are quantized, self-attention's q, k and v
fused; convolutions, resnets, embeddings and cross-attention's k and v stay 16-bit.
"""

from __future__ import annotations

from ..family import Family, Layer, Plain, Stored, shares

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
_IN_BLOCK = ("norm1", "norm2", "norm3", "attn2.to_k", "attn2.to_v")


def _block(stored: str, host: str) -> tuple[Layer, ...]:
    """The quantized linears of one attention block's transformer blocks."""
    stored, host = f"{stored}.transformer_blocks.{{}}.", f"{host}.transformer_blocks.{{}}."
    qkv = zip(("attn1.to_q", "attn1.to_k", "attn1.to_v"), shares(stored + "attn1.to_qkv", 3), strict=True)
    same = ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    return (
        *(Layer(host + name, (*option, (Stored(stored + name),))) for name, option in qkv),
        *(Layer(host + name, ((Stored(stored + name),),)) for name in same),
    )


FAMILY = Family(
    name="SDXL",
    marker=r"(down_blocks|mid_block|up_blocks)\..*\.transformer_blocks\.\d+\.attn1\.(to_qkv|to_q)",
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
)
