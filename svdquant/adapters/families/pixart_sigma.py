"""PixArt-Sigma on ComfyUI's `PixArtMS`: names as diffusers has them, q, k and v apart."""

from __future__ import annotations

from ..family import Family, Layer, Plain, Stored, unsigned

_T, _B = "transformer_blocks.{}.", "blocks.{}."


def _layer(host: str, *stored: Stored) -> Layer:
    return Layer(_B + host, (stored,))


def _linear(stored: str, host: str) -> tuple[Plain, ...]:
    return tuple(Plain(f"{stored}.{end}", f"{host}.{end}") for end in ("weight", "bias"))


FAMILY = Family(
    name="PixArt-Sigma",
    marker=r"transformer_blocks\.\d+\.attn2\.to_q",
    beside=r"pos_embed\.proj\.weight",
    layers=(
        _layer("attn.qkv", *(Stored(f"{_T}attn1.to_{x}") for x in "qkv")),
        _layer("attn.proj", Stored(_T + "attn1.to_out.0")),
        _layer("cross_attn.q_linear", Stored(_T + "attn2.to_q")),
        _layer("cross_attn.kv_linear", *(Stored(f"{_T}attn2.to_{x}") for x in "kv")),
        _layer("cross_attn.proj", Stored(_T + "attn2.to_out.0")),
        _layer("mlp.fc1", Stored(_T + "ff.net.0.proj")),
        _layer("mlp.fc2", unsigned(_T + "ff.net.2")),
    ),
    plain=(
        Plain(_T + "scale_shift_table", _B + "scale_shift_table"),
        Plain("scale_shift_table", "final_layer.scale_shift_table"),
        Plain("caption_projection.y_embedding", "y_embedder.y_embedding"),
        *_linear("pos_embed.proj", "x_embedder.proj"),
        *_linear("proj_out", "final_layer.linear"),
        *_linear("adaln_single.linear", "t_block.1"),
        *(
            tensor
            for i, end in ((1, "0"), (2, "2"))
            for tensor in _linear(f"adaln_single.emb.timestep_embedder.linear_{i}", f"t_embedder.mlp.{end}")
        ),
        *(
            tensor
            for i in (1, 2)
            for tensor in _linear(f"caption_projection.linear_{i}", f"y_embedder.y_proj.fc{i}")
        ),
    ),
    optional=r"y_embedder\.y_embedding",
)
