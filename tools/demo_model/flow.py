"""Flow matching for the demo model: what it learns from, and how a drawing is sampled.

At time t a latent is x = (1 - t) * image + t * noise, and the model learns the velocity noise - image.
Sampling walks from t = 1 to t = 0 in Euler steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Encoder = Callable[[str], tuple[Tensor, Tensor]]
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prompts:
    """A table of encoded prompts; row 0 is always the empty prompt.

    context  [1 + C, 6, 4096]  fp32
    pooled   [1 + C, 768]      fp32
    rows     caption -> its row
    """

    context: Tensor
    pooled: Tensor
    rows: dict[str, int]

    @classmethod
    def encode(cls, captions: Iterable[str], encoder: Encoder) -> Prompts:
        """Encode each caption once."""
        unique = ["", *sorted(set(captions))]
        context, pooled = zip(*(encoder(caption) for caption in unique), strict=True)
        return cls(
            torch.cat(context), torch.cat(pooled), {caption: row for row, caption in enumerate(unique)}
        )

    def index(self, captions: Iterable[str]) -> Tensor:
        """The rows of these captions, [B]."""
        return torch.tensor([self.rows[caption] for caption in captions])

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Context and pooled of these rows."""
        return self.context[rows], self.pooled[rows]


def drop_captions(rows: Tensor, chance: float = 0.1) -> Tensor:
    """Replace some rows by the empty prompt, so that guidance has something to compare with."""
    return torch.where(torch.rand(len(rows)) < chance, 0, rows)


def noised(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents at random times (middling ones are likelier), the times [B], and the velocities to learn."""
    t = torch.sigmoid(1.1 * torch.randn(len(latents)) + 0.3)
    noise = torch.randn_like(latents)
    mix = t[:, None, None, None]
    return (1 - mix) * latents + mix * noise, t, noise - latents


def schedule(steps: int, shift: float = 1.15) -> Tensor:
    """Times 1 -> 0, [steps + 1]. A larger shift has more near pure noise, 0 is even."""
    t = torch.linspace(1, 0, steps + 1)
    return t * math.exp(shift) / (1 + (math.exp(shift) - 1) * t)


@torch.no_grad()
def sample(
    velocity: Velocity, noise: Tensor, prompts: Prompts, rows: Tensor, *, times: Tensor, cfg: float = 2.0
) -> Tensor:
    """Walk from noise to a model latent of the same shape, with classifier-free guidance.

    velocity  the model, or anything called like it
    noise     [B, 16, h, w]    fp32
    rows      [B]              int64   which prompt each drawing follows
    times     [steps + 1]      fp32    from `schedule`
    """
    wanted, nothing = prompts.take(rows), prompts.take(torch.zeros_like(rows))
    x = noise
    for now, then in pairwise(times):
        t = now.expand(len(x))
        v = velocity(x, t, *wanted)
        if cfg != 1.0:
            blind = velocity(x, t, *nothing)
            v = blind + cfg * (v - blind)
        x = x + (then - now) * v
    return x
