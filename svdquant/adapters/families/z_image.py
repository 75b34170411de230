"""Z-Image and Z-Image-Turbo on ComfyUI's `NextDiT`.

Stored names are diffusers'. The SwiGLU's two input halves are one stored linear, value (w3) before gate (w1); the host
keeps them apart, as 16-bit models do. Refiner blocks may be dense, with q, k and v apart: those become 16-bit host
layers.
"""

from __future__ import annotations

import json

from ..family import Family, Layer, Plain, Published, Shapes, Stored, shares

_COUNTED = ("layers", "noise_refiner", "context_refiner")
_BLOCKS = tuple(f"{block}.{{}}." for block in _COUNTED)


def _layers(block: str) -> tuple[Layer, ...]:
    split = tuple(Stored(f"{block}attention.to_{x}") for x in "qkv")
    w3, w1 = shares(block + "feed_forward.net.0.proj", 2)
    own = {w: (Stored(f"{block}feed_forward.{w}"),) for w in ("w1", "w2", "w3")}
    return (
        Layer(block + "attention.qkv", ((Stored(block + "attention.to_qkv"),), split)),
        Layer(block + "attention.out", ((Stored(block + "attention.to_out.0"),),)),
        Layer(block + "feed_forward.w3", (*w3, own["w3"])),
        Layer(block + "feed_forward.w1", (*w1, own["w1"])),
        Layer(block + "feed_forward.w2", ((Stored(block + "feed_forward.net.2"),), own["w2"])),
    )


def _plain(block: str) -> tuple[Plain, ...]:
    """Norms, and the layers of a dense block."""
    qkv = tuple(f"{block}attention.to_{x}.weight" for x in "qkv")
    return (
        Plain(block + "attention.norm_q.weight", block + "attention.q_norm.weight"),
        Plain(block + "attention.norm_k.weight", block + "attention.k_norm.weight"),
        Plain(qkv, block + "attention.qkv.weight"),
        Plain(block + "attention.to_out.0.weight", block + "attention.out.weight"),
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


def _metadata(shapes: Shapes) -> dict[str, str]:
    """The header of a published file, with this model's sizes; its refiners are quantized too."""
    width, text = shapes["cap_embedder.1.weight"]
    blocks = {
        block: len({n.split(".")[1] for n in shapes if n.startswith(block + ".")}) for block in _COUNTED
    }
    config = {
        **dict(_class_name="ZImageTransformer2DModel", axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512]),
        **dict(cap_feat_dim=text, dim=width, in_channels=16, n_heads=width // 128, n_kv_heads=width // 128),
        **dict(
            n_layers=blocks["layers"], n_refiner_layers=blocks["noise_refiner"], norm_eps=1e-5, qk_norm=True
        ),
        **dict(rope_theta=256.0, t_scale=1000.0, all_f_patch_size=[1], all_patch_size=[2]),
    }
    kept = {"config": json.dumps(config), "comfy_config": "{}"}
    kept["quantization_config"] = json.dumps({"skip_refiners": False})
    return {"model_class": "NunchakuZImageTransformer2DModel", **kept}


FAMILY = Family(
    name="Z-Image",
    marker=r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.to_.*|feed_forward\.net\..*)",
    layers=tuple(layer for block in _BLOCKS for layer in _layers(block)),
    plain=(
        *(plain for block in _BLOCKS for plain in _plain(block)),
        *_TOP,
    ),
    same=(
        r"((cap_embedder|t_embedder|x_embedder|final_layer)\..*|[xc]\w*_pad_token|"
        r"\w+\.\d+\.(adaLN_modulation\.0|attention_norm[12]|ffn_norm[12]|attention\.qkv|feed_forward\.w[123])\..*)"
    ),
    published=Published(host=r"[xc]\w*_pad_token", metadata=_metadata),
)
