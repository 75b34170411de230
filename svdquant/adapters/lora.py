"""Put a LoRA file on a model, through the host's own patches, and say what it did."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert

from ...loaders.lora import read_lora

log = logging.getLogger("svdquant-nodes")


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA file turned into.

    name       the file
    strength   as given
    matched    layers it patches
    unmatched  its tensors that belong to no layer of this model
    rank       summed over layers
    """

    name: str
    strength: float
    matched: int
    unmatched: tuple[str, ...]
    rank: int

    def __str__(self) -> str:
        text = f"{self.name} at {self.strength:g}: {self.matched} layers, rank {self.rank} in all"
        if self.unmatched:
            more = f" and {len(self.unmatched) - 10} more" if len(self.unmatched) > 10 else ""
            text += f"; not of this model: {', '.join(self.unmatched[:10])}{more}"
        return text


def apply_lora(model, path: Path, strength: float):
    """A clone of `model` with a LoRA joined; nothing is requantized, and the original is untouched.

    model     MODEL, quantized or not
    returns   (clone, LoraReport)

    Raises ValueError where the file is no LoRA or matches no layer of the model.
    """
    tensors = comfy.lora_convert.convert_lora(read_lora(path))
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(tensors, key_map, log_missing=False)
    clone = model.clone()
    joined = clone.add_patches(patches, strength)
    if not joined:
        raise ValueError(
            f"{path.name}: none of its {len(tensors)} tensors, such as {next(iter(tensors))!r}, belongs to this model. "
            "Choose a LoRA made for the model's family."
        )
    report = LoraReport(
        path.name, strength, len(joined), _unmatched(tensors, patches), _rank(patches, joined)
    )
    log.info("LoRA: %s", report)
    return clone, report


def _unmatched(tensors, patches) -> tuple[str, ...]:
    loaded: set[str] = set()
    for patch in patches.values():
        loaded |= set(getattr(patch, "loaded_keys", ()))
    ends = (
        ".alpha",
        ".diff",
        ".diff_b",
        ".w_norm",
        ".b_norm",
        ".set_weight",
        ".dora_scale",
        ".reshape_weight",
    )
    return tuple(name for name in tensors if name not in loaded and not name.endswith(ends))


def _rank(patches, joined) -> int:
    downs = (patches[key].weights[1] for key in joined if getattr(patches[key], "name", "") == "lora")
    return sum(down.shape[0] for down in downs)
