"""Train the demo's base model and its VAE from nothing: drawings in, two safetensors files out.

    OMP_NUM_THREADS=1 python tools/demo_model/train.py --out demo

The shipped weights saw 4281 steps in all (batch 32 to 64): shapes are recognisable after 1600 and clean after
4000, which is the better part of an hour on one core. `--resume` goes on from a file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pack

pack.alias()
from svdquant_nodes.svdquant.adapters.demo import GRAMMAR, DemoVAE, encode_prompt
from svdquant_nodes.tools.demo_model import files, flow, flux, shapes

LATENT_SCALE = 1.6  # the strongest components of a drawing's latent get about the variance of the noise


def fit_vae(images: Tensor) -> DemoVAE:
    """Principal components of 8x8 patches. Weak components are damped half-way to white, not to noise."""
    patches = F.pixel_unshuffle(images, 8).movedim(1, -1).reshape(-1, 192)
    mean = patches.mean(0)
    centred = patches - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
    basis = vectors[:, -16:].T.flip(0).contiguous()
    std = (centred @ basis.T).std(0).clamp(min=1e-4)
    return DemoVAE(mean, basis, (std * std[0]).sqrt() / LATENT_SCALE)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Sixty steps of warm-up, then a cosine to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / 60) * (0.98 * cosine + 0.02)


def zero_outputs(model: flux.Flux) -> None:
    """Start with modulations and the last layer at zero, so that every block begins as the identity."""
    lasts = [model.final_layer.linear, model.final_layer.adaLN_modulation[1]]
    lasts += [module.lin for module in model.modules() if isinstance(module, flux.Modulation)]
    for layer in lasts:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def train(
    model: flux.Flux, latents: Tensor, rows: Tensor, prompts: flow.Prompts, args: argparse.Namespace
) -> dict:
    """Fit the model; returns the running average of its weights, which draws better than the last ones."""
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    started, losses = time.time(), []
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
        pick = torch.randint(len(latents), (args.batch,))
        x, t, velocity = flow.noised(latents[pick])
        loss = F.mse_loss(model(x, t, *prompts.take(flow.drop_captions(rows[pick]))), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, 1 - 1 / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - decay)
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1:5d}  loss {recent:.4f}  {time.time() - started:.0f} s", flush=True)
    return average


def save_model(weights: dict[str, Tensor], path: Path) -> None:
    """Write the weights in bf16 with what a loader and a reader want to know."""
    metadata = {
        "format": "pt",
        "title": "SVDQuant demo: a tiny FLUX.1 of drawn shapes",
        "license": "Apache-2.0",
        "prompt": GRAMMAR,
        "config": json.dumps(flux.FluxConfig().to_json()),
    }
    save_file(
        {name: t.to(torch.bfloat16).contiguous() for name, t in weights.items()}, path, metadata=metadata
    )


def save_vae(vae: DemoVAE, path: Path) -> None:
    """Write the linear VAE."""
    metadata = {"format": "pt", "title": "SVDQuant demo: linear VAE of 8x8 patches", "license": "Apache-2.0"}
    tensors = {"mean": vae.mean, "basis": vae.basis, "scale": vae.scale}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--resume", type=Path, help="model file to start from")
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--steps", type=int, default=4300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    images, scenes = shapes.dataset(args.images, seed=args.seed + 1)
    vae = fit_vae(images[:4000])
    latents = vae.from_patches(images)
    prompts = flow.Prompts.encode((scene.caption for scene in scenes), encode_prompt)
    model = flux.Flux()
    if args.resume:
        model = flux.load(args.resume).train().requires_grad_(True)
    else:
        zero_outputs(model)
    average = train(model, latents, prompts.index(scene.caption for scene in scenes), prompts, args)
    save_model(average, files.place(args.out, files.MODEL))
    save_vae(vae, files.place(args.out, files.VAE))


if __name__ == "__main__":
    main()
