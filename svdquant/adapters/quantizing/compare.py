"""Sample a 16-bit model and its 4-bit form from the same noise, and find the linears that differ most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import torch
from torch import Tensor

from .. import sampling
from ..operations import quantized_linears
from . import calibration


@dataclass(frozen=True)
class Drawn:
    """What one model made of the noise."""

    images: Tensor
    report: str


def draw(model, vae, positive, negative, latent, settings: sampling.Settings) -> Drawn:
    """Sample and decode: images [B, H, W, 3] in 0..1, and the sampler's report of time and memory."""
    samples, report = sampling.sample(model, positive, negative, latent, settings)
    images = vae.decode(samples["samples"])
    return Drawn(images.reshape(-1, *images.shape[-3:]).float().cpu(), report)


def layer_errors(exact, near, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative output error of every quantized linear on what the same linear of the 16-bit model read.

    exact, near   host MODELs of the same class
    inputs        path in the diffusion model -> rows [T, K]
    returns       the same paths -> ||y4 - y16|| / ||y16||, worst first
    """
    device = comfy.model_management.get_torch_device()
    comfy.model_management.load_models_gpu([exact, near])
    theirs = dict(exact.model.diffusion_model.named_modules())
    errors = {}
    for key, layer in quantized_linears(near.model):
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if name in inputs and name in theirs:
            x = inputs[name].to(device)
            y, want = layer(x).float(), plain_linear(theirs[name], x)
            errors[name] = (torch.dist(y, want) / want.norm().clamp(min=1e-30)).item()
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def plain_linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """A 16-bit linear in fp32, wherever the host keeps its weight: [T, K] -> [T, N]."""
    weight, bias = (None if t is None else t.to(x.device).float() for t in (layer.weight, layer.bias))
    return torch.nn.functional.linear(x.float(), weight, bias)


def watched_clone(model, see: calibration.See):
    """The 16-bit model, watched while it draws."""
    return calibration.recording(model, see)
