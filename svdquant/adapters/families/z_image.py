"""Z-Image and Z-Image-Turbo on ComfyUI's `NextDiT`.

Stored names are diffusers'. The SwiGLU's two input halves are one stored linear, value (w3) before gate (w1); the host
keeps them apart. Refiner blocks may be dense, with q, k and v apart: those become 16-bit host layers.
"""

from __future__ import annotations

from ..family import Family, Layer, Plain, Stored, shares

_BLOCKS = ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.")


def _layers(block: str) -> tuple[Layer, ...]:
    split = tuple(Stored(f"{block}attention.to_{x}") for x in "qkv")
    w3, w1 = shares(block + "feed_forward.net.0.proj", 2)
    return (
        Layer(block + "attention.qkv", ((Stored(block + "attention.to_qkv"),), split)),
        Layer(block + "attention.out", ((Stored(block + "attention.to_out.0"),),)),
        Layer(block + "feed_forward.w3", w3),
        Layer(block + "feed_forward.w1", w1),
        Layer(block + "feed_forward.w2", ((Stored(block + "feed_forward.net.2"),),)),
    )


def _plain(block: str) -> tuple[Plain, ...]:
    """Norms, and the layers of a dense block."""
    qkv = tuple(f"{block}attention.to_{x}.weight" for x in "qkv")
    value_gate = f"{block}feed_forward.net.0.proj.weight"
    return (
        Plain(block + "attention.norm_q.weight", block + "attention.q_norm.weight"),
        Plain(block + "attention.norm_k.weight", block + "attention.k_norm.weight"),
        Plain(qkv, block + "attention.qkv.weight"),
        Plain(block + "attention.to_out.0.weight", block + "attention.out.weight"),
        Plain(value_gate, block + "feed_forward.w3.weight", lambda t: t.chunk(2)[0]),
        Plain(value_gate, block + "feed_forward.w1.weight", lambda t: t.chunk(2)[1]),
        Plain(block + "feed_forward.net.2.weight", block + "feed_forward.w2.weight"),
    )


_TOP = (
    *(Plain(f"all_x_embedder.2-1.{end}", f"x_embedder.{end}") for end in ("weight", "bias")),
    *(Plain(f"all_final_layer.2-1.linear.{end}", f"final_layer.linear.{end}") for end in ("weight", "bias")),
    *(
        Plain(f"all_final_layer.2-1.adaLN_modulation.1.{end}", f"final_layer.adaLN_modulation.1.{end}")
        for end in ("weight", "bias")
    ),
)

FAMILY = Family(
    name="Z-Image",
    marker=r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_qkv|to_q)",
    layers=tuple(layer for block in _BLOCKS for layer in _layers(block)),
    plain=(
        *(plain for block in _BLOCKS for plain in _plain(block)),
        *_TOP,
    ),
    same=(
        r"((cap_embedder|t_embedder|x_embedder|final_layer)\..*|[xc]\w*_pad_token|"
        r"\w+\.\d+\.(adaLN_modulation\.0|attention_norm[12]|ffn_norm[12])\..*)"
    ),
)
