"""What LoRA trainers call a model's layers: the host's own map of names, and what it leaves out.

The host knows most diffusers names, but for some families not those of kohya-style files (dots become underscores),
and for others not diffusers' at all. Nothing here replaces a name that the host knows.
"""

from __future__ import annotations

import comfy.lora

from .diffusers_names import diffusers_names

Target = str | tuple  # the host's: a weight's key; for a part of one (key, offset) or (key, offset, function)

PREFIX = "diffusion_model."
_DOTTED = (PREFIX, "transformer.", "unet.", "base_model.model.")


def known_names(model) -> dict[str, Target]:
    """Every name for a layer of the model, and the layer: the host's, diffusers', and both with underscores."""
    known = comfy.lora.model_lora_keys_unet(model, {})
    for name, target in list(known.items()):
        for spelled in diffusers_names(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else ():
            known.setdefault(f"transformer.{spelled}", target)
    for name, target in list(known.items()):
        weight = target if isinstance(target, str) else target[0]
        if "." in name and weight.endswith(".weight"):
            known.setdefault(f"lora_unet_{_bare(name).replace('.', '_')}", target)
    return known


def _bare(name: str) -> str:
    for prefix in _DOTTED:
        name = name.removeprefix(prefix)
    return name
