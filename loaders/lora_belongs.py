"""Whether a LoRA was made for this model, judged by its names: refused in one sentence where it was not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from .lora_names import Renamed, guess_family, guess_other_family, split

_BLOCK = re.compile(r"(?:lora_unet_|lora_transformer_|lycoris_|.*\.)?([a-z_]*(?:blocks|layers))[._](\d+)[._]")
_OTHER = "Choose a LoRA made for the model's family."


def check_belongs(
    path: Path, tensors: Mapping[str, Tensor], renamed: Renamed, known: Iterable[str], *, matched: bool
) -> None:
    """Raise a ValueError for a LoRA of a deeper model, of another family, or that changes nothing here.

    known     the names that the model knows
    matched   whether anything of the file changes a layer
    """
    other = guess_other_family(renamed.unmatched, known)
    if not other:  # block numbers of another family say nothing
        _check_depth(path, renamed.unmatched, known)
    if not matched:
        raise ValueError(f"{path.name}: {_why_none(tensors, renamed)}")
    if other:
        raise ValueError(
            f"{path.name}: {len(renamed.unmatched)} of its {len(tensors)} tensors, such as {renamed.unmatched[0]!r}, "
            f"belong to no layer of this model. It looks like a LoRA for {other}. {_OTHER}"
        )


def _check_depth(path: Path, unmatched: Iterable[str], known: Iterable[str]) -> None:
    depths: dict[str, int] = {}
    for name in known:
        for kind, index in _BLOCK.findall(name)[:1]:
            depths[kind] = max(depths.get(kind, 0), int(index))
    for name in unmatched:
        for kind, index in _BLOCK.findall(name)[:1]:
            if kind in depths and int(index) > depths[kind]:
                raise ValueError(
                    f"{path.name}: {name}: expected {kind} 0 to {depths[kind]}, got {index}. "
                    "The LoRA is for a model with more blocks; choose one made for this model."
                )


def _why_none(tensors: Mapping[str, Tensor], renamed: Renamed) -> str:
    example = next(iter(renamed.unmatched), next(iter(tensors), "(none)"))
    if {split(name)[1] for name in tensors} <= {"", "set_weight"}:
        return f"expected a LoRA, got {len(tensors)} tensors such as {example!r}, none of a LoRA. Is it a whole model?"
    looks = guess_family(tensors)
    for_clip = len(renamed.text_encoder) == len(tensors) > 0
    remedy = "Use ComfyUI's Load LoRA, which takes a CLIP." if for_clip else _OTHER
    return (
        f"none of its {len(tensors)} tensors, such as {example!r}, belongs to this model. "
        f"{f'It looks like a LoRA for {looks}. ' if looks else ''}{remedy}"
    )
