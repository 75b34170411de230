"""Chroma on ComfyUI's `Chroma`: FLUX.1's blocks without modulations, which a network of their own makes for all.

Names are FLUX.1's: Nunchaku's fused modules (v1), the same as module paths (v2), or plain diffusers (nunchaku_lite).
Two engines that run such files disagree about int4 activations after a GELU, so each layer's bias is asked.
"""

from __future__ import annotations

from dataclasses import replace

from ..family import Family, Layer, Plain, Stored
from . import flux

_NETWORK = "distilled_guidance_layer.layers.{}."
_STEPS = ((_NETWORK + "linear_1", _NETWORK + "in_layer"), (_NETWORK + "linear_2", _NETWORK + "out_layer"))


def _ask_bias(stored: Stored) -> Stored:
    return replace(stored, role=replace(stored.role, shift_in_bias=True)) if stored.role.act_shift else stored


_BLOCKS = tuple(
    replace(layer, options=tuple(tuple(map(_ask_bias, option)) for option in layer.options))
    for layer in flux.FAMILY.layers
    if not layer.options[0][0].role.splits
)

FAMILY = Family(
    name="Chroma",
    marker=r"(single_)?transformer_blocks\.\d+\..+",
    beside=r"distilled_guidance_layer\.norms\.0\.(weight|scale)",
    layers=(*_BLOCKS, *(Layer(host, ((Stored(stored),),)) for stored, host in _STEPS)),
    plain=(
        *(
            plain
            for plain in flux.FAMILY.plain
            if not plain.names[0].startswith(("time_text_embed", "norm_out"))
        ),
        *(Plain(f"{stored}.{end}", f"{host}.{end}") for stored, host in _STEPS for end in ("weight", "bias")),
    ),
    same=rf"{flux.FAMILY.same}|distilled_guidance_layer\.((in|out)_proj|norms\.\d+)\..*",
)
