"""Four bits or eight: how wide the activations of a loaded model are, and its weights with them.

A checkpoint holds 4-bit weights. Run in 8 bits (core/int8.py) they take twice the memory, half of what 16 bits take,
and the model is closer to the 16-bit one. Layers are widened one by one while they are loaded, so what the host then
measures and moves are the 8-bit ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import comfy.model_management
import torch

from ..core import int8
from ..core.linear import Part
from ..core.weights import LinearWeights
from ..kernels import ops
from .devices import able

AUTO, FOUR, EIGHT = CHOICES = ("auto", "4 bit", "8 bit")
WIDENING_BYTES = 20  # a weight's, at the peak: fp32 copies of it, of its scales and of what is made of them


def in_eight_bits(wanted: str, device: torch.device) -> bool:
    """Whether a model for this device is to be loaded in 8 bits; "auto" leaves it to what the card is fastest at.

    Raises ValueError for a word that is not in CHOICES.
    """
    if wanted not in CHOICES:
        raise ValueError(f"activations: expected one of {', '.join(CHOICES)}, got {wanted!r}.")
    return wanted == EIGHT or (wanted == AUTO and ops.eight_bits_pay(device.type, device.index))


def widen(parts: Sequence[Part], device: torch.device) -> tuple[Part, ...]:
    """The parts of a host layer in 8 bits, computed and left on `device`, if it is able; AWQ parts stay as they are."""
    return tuple(
        part
        if part.weights.spec.format == "awq"
        else replace(part, weights=_widened(part.weights, able(device)))
        for part in parts
    )


def _widened(weights: LinearWeights, device: torch.device) -> LinearWeights:
    if device.type != "cpu":
        elements = weights.out_features * weights.in_features
        comfy.model_management.free_memory(WIDENING_BYTES * elements, device)
    there = {name: t.to(device) for name, t in weights.tensors().items()}
    return int8.requantize(replace(weights, **there))
