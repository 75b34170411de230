"""A 4-bit file in the plain-torch demo model, with or without a LoRA, to look at it without ComfyUI."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...loaders.checkpoint import Checkpoint
from ...loaders.detect import open_checkpoint
from ...svdquant.adapters.conventions import straighten
from ...svdquant.adapters.families import flux as family
from ...svdquant.adapters.family import Role, apply_role, assemble
from ...svdquant.core import linear, reference
from ...svdquant.core.weights import LinearWeights
from .flux import Flux


class FourBitLinear(nn.Module):
    """A model linear made of stored ones."""

    def __init__(self, parts: tuple[linear.Part, ...], bias: Tensor):
        super().__init__()
        self.parts, self.bias = parts, bias
        self.branches: tuple[linear.Branch, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        return linear.forward(x, self.parts, self.bias, self.branches, reference)


def read_linear(checkpoint: Checkpoint, name: str, role: Role) -> LinearWeights:
    """A stored linear in the model's own row order."""
    weights = apply_role(checkpoint.layers[name], role)
    return straighten(weights, role.splits) if role.splits else weights


@torch.no_grad()
def load(path: Path, model: Flux) -> Flux:
    """A copy of the 16-bit model with every tensor of a 4-bit file in its place."""
    checkpoint, model = open_checkpoint(path), copy.deepcopy(model)
    mapped = family.FAMILY.map_names(checkpoint)
    for host, source in mapped.plain.items():
        model.get_parameter(host).copy_(source.read(checkpoint.plain))
    for host, pieces in mapped.linears.items():
        stored = [read_linear(checkpoint, name, role) for name, role in pieces]
        parent, _, child = host.rpartition(".")
        layer = FourBitLinear(*assemble(stored, mapped.axes[host]))
        setattr(model.get_submodule(parent), child, layer)
    return model


def set_lora(model: Flux, path: Path, strength: float) -> None:
    """Give every linear that a LoRA in kohya's naming knows its branch, in place of the one it had."""
    tensors = load_file(path)
    for name, layer in model.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if isinstance(layer, FourBitLinear) and f"{key}.alpha" in tensors:
            down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
            factor = strength * tensors[f"{key}.alpha"].item() / len(down)
            branch = linear.Branch(down, up, factor, rows=slice(len(up)), columns=slice(down.shape[1]))
            layer.branches = (branch,)
