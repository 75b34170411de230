"""FLUX.2 (dev, Klein 4B and 9B) on ComfyUI's `Flux`, in files made for diffusers (nunchaku_lite) or with fused modules.

Nothing has a bias, activations are SwiGLU, and all blocks share modulations that stay 16-bit. diffusers has one linear
for q, k, v and the MLP's input in a single block, and one for both outputs, as the host does; others store two of each.
"""

from __future__ import annotations

from ..family import Family, Layer, Plain, Stored, swap_halves

_D, _S = "transformer_blocks.{}.", "single_transformer_blocks.{}."


def _options(block: str, *options: str) -> tuple[tuple[Stored, ...], ...]:
    return tuple(tuple(Stored(block + name) for name in option.split()) for option in options)


def _stream(host: str, context: str, fused: str, split: str, out: str) -> tuple[Layer, ...]:
    """The linears of one stream (image or text) of a double block."""
    d, ff = f"double_blocks.{{}}.{host}", f"ff{context}"
    return (
        Layer(d + "_attn.qkv", _options(_D, f"attn.{fused}", f"qkv_proj{context}", split)),
        Layer(d + "_attn.proj", _options(_D, f"out_proj{context}", f"attn.{out}")),
        Layer(d + "_mlp.0", _options(_D, f"mlp{context}_fc1", f"{ff}.linear_in")),
        Layer(d + "_mlp.2", _options(_D, f"mlp{context}_fc2", f"{ff}.linear_out")),
    )


_SINGLE = (
    Layer(
        "single_blocks.{}.linear1",
        _options(_S, "attn.qkv_proj attn.mlp_fc1", "qkv_proj mlp_fc1", "attn.to_qkv_mlp_proj"),
    ),
    Layer(
        "single_blocks.{}.linear2",
        _options(_S, "attn.out_proj attn.mlp_fc2", "out_proj mlp_fc2", "attn.to_out"),
        axis="columns",
    ),
)
_WEIGHTS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    **{f"double_stream_modulation_{s}.linear": f"double_stream_modulation_{s}.lin" for s in ("img", "txt")},
    **{
        f"time_guidance_embed.{stored}_embedder.linear_{i}": f"{host}.{end}"
        for stored, host in (("timestep", "time_in"), ("guidance", "guidance_in"))
        for i, end in ((1, "in_layer"), (2, "out_layer"))
    },
}
_NORMS = {
    _D + "attn.norm_": "double_blocks.{}.img_attn.norm",
    _D + "attn.norm_added_": "double_blocks.{}.txt_attn.norm",
    _S + "attn.norm_": "single_blocks.{}.norm",
}

FAMILY = Family(
    name="FLUX.2",
    marker=r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|mlp_fc1)|transformer_blocks\.\d+\.ff\.linear_in",
    layers=(
        *_stream("img", "", "to_qkv", "attn.to_q attn.to_k attn.to_v", "to_out.0"),
        *_stream(
            "txt", "_context", "to_added_qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "to_add_out"
        ),
        *_SINGLE,
    ),
    plain=(
        *(Plain(f"{stored}.weight", f"{host}.weight") for stored, host in _WEIGHTS.items()),
        Plain("norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight", swap_halves),
        *(
            Plain(f"{stored}{x[0]}.weight", f"{host}.{x}_norm.scale")
            for stored, host in _NORMS.items()
            for x in ("query", "key")
        ),
    ),
)
