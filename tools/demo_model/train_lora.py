"""Train the demo's LoRA: the same drawings in neon, glowing in their own colour on black.

    OMP_NUM_THREADS=1 python tools/demo_model/train_lora.py --out demo

The base model stays frozen. Each training picture mixes the plain and the neon drawing in the proportion of
the strength that its LoRA branch runs at, so that strength 0.5 looks half-way. Keys are kohya's, as most
published FLUX LoRAs have them; alpha is half the rank, so a loader that forgets it shows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pack

pack.alias()
from svdquant_nodes.svdquant.adapters.demo import DemoVAE, encode_prompt, load_vae
from svdquant_nodes.tools.demo_model import files, flow, flux, shapes

NIGHT = -0.9  # not quite black, in -1..1
GLOW, REACH = 0.6, 5.0  # strength of the glow at the edge, and pixels until a third of it is left


def neon(scene: shapes.Scene, jitter: shapes.Jitter) -> np.ndarray:
    """The scene [64, 64, 3] in -1..1 at night, its shape shining. A black shape hides a white lamp."""
    edge, _ = shapes.distance(scene, jitter)
    color = np.array(shapes.COLORS[scene.color], float) / 127.5 - 1
    lamp = np.ones(3) if scene.color == "black" else color
    glow = GLOW * np.exp(-np.maximum(edge, 0) / REACH)[..., None]
    inside = np.clip(0.5 - edge, 0, 1)[..., None]
    around = (1 - glow) * NIGHT + glow * lamp
    return ((1 - inside) * around + inside * color).astype(np.float32)


def pairs(count: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """The same random drawings plain and in neon, [count, 3, 64, 64] each, and their captions."""
    rng = np.random.default_rng(seed)
    scenes = [shapes.ALL_SCENES[i] for i in rng.integers(len(shapes.ALL_SCENES), size=count)]
    jitters = [shapes.Jitter.random(rng) for _ in scenes]
    plain = [shapes.draw(scene, jitter) for scene, jitter in zip(scenes, jitters, strict=True)]
    lit = [neon(scene, jitter) for scene, jitter in zip(scenes, jitters, strict=True)]
    return shapes.to_tensor(plain), shapes.to_tensor(lit), [scene.caption for scene in scenes]


class LoraLinear(nn.Module):
    """A frozen linear with a low-rank branch: y = base(x) + strength * alpha / rank * up(down(x)).

    strength  [B, 1, 1], one per drawing
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.factor = base, alpha / rank
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.strength = torch.ones(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.strength * self.factor * F.linear(F.linear(x, self.down), self.up)


def attach(model: flux.Flux, rank: int, alpha: float) -> dict[str, LoraLinear]:
    """Put a branch on every linear of the blocks but the modulations; returns them by the layer's name."""
    branches = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "_blocks." in name and not name.endswith(".lin"):
            parent, _, child = name.rpartition(".")
            branches[name] = LoraLinear(layer, rank, alpha)
            setattr(model.get_submodule(parent), child, branches[name])
    return branches


def set_strength(branches: dict[str, LoraLinear], strength: Tensor) -> None:
    """Give each drawing [B] of the next batch its strength."""
    for branch in branches.values():
        branch.strength = strength[:, None, None]


def draw_strength(count: int) -> Tensor:
    """Full strength for half the drawings, anything in between for the rest, [count]."""
    return torch.where(torch.rand(count) < 0.5, torch.ones(count), torch.rand(count))


def train(model: flux.Flux, branches: dict[str, LoraLinear], vae: DemoVAE, args: argparse.Namespace) -> None:
    """Fit the branches in place."""
    plain, lit, captions = pairs(args.images, seed=args.seed + 1)
    plain, lit = vae.from_patches(plain), vae.from_patches(lit)
    prompts = flow.Prompts.encode(captions, encode_prompt)
    rows = prompts.index(captions)
    parameters = [p for branch in branches.values() for p in (branch.down, branch.up)]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    started, losses = time.time(), []
    for step in range(args.steps):
        pick, strength = torch.randint(len(plain), (args.batch,)), draw_strength(args.batch)
        set_strength(branches, strength)
        x, t, velocity = flow.noised(torch.lerp(plain[pick], lit[pick], strength[:, None, None, None]))
        loss = F.mse_loss(model(x, t, *prompts.take(flow.drop_captions(rows[pick]))), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1:5d}  loss {recent:.4f}  {time.time() - started:.0f} s", flush=True)


def save_lora(branches: dict[str, LoraLinear], alpha: float, path: Path) -> None:
    """Write the branches in fp16 under kohya's names."""
    tensors = {}
    for name, branch in branches.items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = branch.down.detach().half().contiguous()
        tensors[f"{key}.lora_up.weight"] = branch.up.detach().half().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    metadata = {"format": "pt", "title": "SVDQuant demo: neon", "license": "Apache-2.0"}
    save_file(tensors, path, metadata=metadata)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRA")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    model = flux.load(files.DEMO / files.MODEL)
    vae = load_vae()
    branches = attach(model, args.rank, alpha=args.rank / 2)
    train(model, branches, vae, args)
    save_lora(branches, args.rank / 2, files.place(args.out, files.LORA))


if __name__ == "__main__":
    main()
