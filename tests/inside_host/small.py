"""Small models of every family in 4 bits, and their dense twins."""

from __future__ import annotations

import comfy.sample
import torch
from torch import Tensor

from svdquant_nodes.tests.inside_host import published, twins
from svdquant_nodes.tests.small_models import SMALL, detecting, prompt, random_weights


def write(family: str, path) -> None:
    """A 4-bit file in the host's names: every linear inside a block, except those that stay dense."""
    small = SMALL[family]
    model = small.model()
    tensors = random_weights(model)
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and small.quantizes(name, module.in_features):
            bias = tensors.pop(f"{name}.bias", None)
            layers[name] = published.four_bit(tensors.pop(f"{name}.weight"), bias)
    published.write(path, layers, tensors)


def make(family: str, folder) -> twins.Twins:
    """The family's 4-bit model with exact activations, and its dense twin."""
    path = folder / f"{family}.safetensors"
    write(family, path)
    with detecting():
        return twins.make(path)


def sample(
    family: str, model, steps: int = 1, *, batch: int = 1, cfg: float = 1.0, control=None, seed: int = 1
) -> Tensor:
    """A latent by the host's own sampler."""
    small, generator = SMALL[family], torch.Generator().manual_seed(seed)
    positive, negative = (prompt(small, generator, control) for _ in range(2))
    latent = torch.zeros(batch, *small.latent[1:])
    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=0, disable_pbar=True
    )
