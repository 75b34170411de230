"""FLUX.1 (dev, schnell, Fill, Canny, Depth, Kontext, Krea, any depth and width) on ComfyUI's `Flux`.

Stored names are diffusers' with Nunchaku's fused modules (v1), the same as module paths (v2), or plain diffusers
(nunchaku_lite, q/k/v apart). Single blocks store `linear1` as two linears by rows and `linear2` as two by columns.
"""

from __future__ import annotations

from ..family import Family, Layer, Plain, Stored, modulation, swap_halves, unsigned

_D, _S = "transformer_blocks.{}.", "single_transformer_blocks.{}."


def _stream(host: str, block: str, v1: dict[str, str], v2: dict[str, str]) -> tuple[Layer, ...]:
    """The quantized linears of one stream (image or text) of a double block."""
    d = "double_blocks.{}." + host
    qkv = tuple(Stored(block + "attn." + name) for name in v2["split"].split())
    fused = ((Stored(block + v1["qkv"]),), (Stored(block + "attn." + v2["qkv"]),), qkv)
    return (
        Layer(d + "_attn.qkv", fused),
        Layer(d + "_attn.proj", ((Stored(block + v1["out"]),), (Stored(block + "attn." + v2["out"]),))),
        Layer(d + "_mlp.0", ((Stored(block + v1["fc1"]),), (Stored(block + v2["ff"] + ".net.0.proj"),))),
        Layer(d + "_mlp.2", ((unsigned(block + v1["fc2"]),), (unsigned(block + v2["ff"] + ".net.2"),))),
        Layer(d + "_mod.lin", ((modulation(block + v1["norm"] + ".linear", 6),),)),
    )


_IMAGE = _stream(
    "img",
    _D,
    dict(qkv="qkv_proj", out="out_proj", fc1="mlp_fc1", fc2="mlp_fc2", norm="norm1"),
    dict(qkv="to_qkv", split="to_q to_k to_v", out="to_out.0", ff="ff"),
)
_TEXT = _stream(
    "txt",
    _D,
    dict(
        qkv="qkv_proj_context",
        out="out_proj_context",
        fc1="mlp_context_fc1",
        fc2="mlp_context_fc2",
        norm="norm1_context",
    ),
    dict(qkv="add_qkv_proj", split="add_q_proj add_k_proj add_v_proj", out="to_add_out", ff="ff_context"),
)
_SINGLE = (
    Layer(
        "single_blocks.{}.linear1",
        (
            (Stored(_S + "qkv_proj"), Stored(_S + "mlp_fc1")),
            (Stored(_S + "attn.to_qkv"), Stored(_S + "mlp_fc1")),
            (*(Stored(_S + f"attn.to_{x}") for x in "qkv"), Stored(_S + "proj_mlp")),
        ),
    ),
    Layer(
        "single_blocks.{}.linear2",
        (
            (Stored(_S + "out_proj"), unsigned(_S + "mlp_fc2")),
            (Stored(_S + "attn.to_out"), unsigned(_S + "mlp_fc2")),
            (Stored(_S + "proj_out.linears.0"), Stored(_S + "proj_out.linears.1")),
            (Stored(_S + "proj_out"),),
        ),
        axis="columns",
    ),
    Layer("single_blocks.{}.modulation.lin", ((modulation(_S + "norm.linear", 3),),)),
)


def _both(stored: str, host: str) -> tuple[Plain, ...]:
    return tuple(Plain(f"{stored}.{end}", f"{host}.{end}") for end in ("weight", "bias"))


_PLAIN = (
    *_both("x_embedder", "img_in"),
    *_both("context_embedder", "txt_in"),
    *(
        plain
        for stored, host in (("timestep", "time_in"), ("guidance", "guidance_in"), ("text", "vector_in"))
        for i, end in ((1, "in_layer"), (2, "out_layer"))
        for plain in _both(f"time_text_embed.{stored}_embedder.linear_{i}", f"{host}.{end}")
    ),
    *(
        Plain(f"norm_out.linear.{end}", f"final_layer.adaLN_modulation.1.{end}", swap_halves)
        for end in ("weight", "bias")
    ),
    *_both("proj_out", "final_layer.linear"),
    *(
        plain
        for block, norm, host in (
            (_D, "norm_", "double_blocks.{}.img_attn.norm"),
            (_D, "norm_added_", "double_blocks.{}.txt_attn.norm"),
            (_S, "norm_", "single_blocks.{}.norm"),
        )
        for prefix in ("", "attn.")
        for plain in (
            Plain(f"{block}{prefix}{norm}q.weight", host + ".query_norm.scale"),
            Plain(f"{block}{prefix}{norm}k.weight", host + ".key_norm.scale"),
        )
    ),
)

FAMILY = Family(
    name="FLUX.1",
    marker=r"(single_transformer_blocks\.\d+\.(norm\.linear|mlp_fc1)|transformer_blocks\.\d+\.norm1_context\.linear)",
    layers=_IMAGE + _TEXT + _SINGLE,
    plain=_PLAIN,
    same=r"(double|single)_blocks\.\d+\..*",  # linears that a mixed file keeps in 16 bits
)
