"""A synthetic linear with what makes real ones hard: loud channels, a mean, correlated inputs, uneven rows."""

from __future__ import annotations

import torch

from svdquant_nodes.svdquant.core.weights import INT4, QuantSpec
from svdquant_nodes.svdquant.quantizer.task import Sample, Task


def make_task(
    spec: QuantSpec = INT4,
    *,
    n: int = 192,
    k: int = 128,
    rank: int = 8,
    centred: bool = False,
    seed: int = 0,
    rows: int = 768,
) -> Task:
    """A task with `rows` rows to look at and 256 held out."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(k // 4, k, generator=draw) / (k // 4) ** 0.5
    count = rows + 256
    x = torch.randn(count, k // 4, generator=draw) @ mix + 0.3 * torch.randn(count, k, generator=draw)
    x = (x + 0.5 * torch.randn(k, generator=draw)) * torch.randn(k, generator=draw).mul(0.8).exp()
    if spec.act_shift:
        x = torch.nn.functional.gelu(x)
    w = torch.randn(n, k, generator=draw) * torch.randn(n, 1, generator=draw).mul(0.3).exp() * 0.05
    sample = Sample.of(x[:rows].bfloat16(), x[rows:].bfloat16())
    center = sample.mean if centred else None
    return Task(w, torch.randn(n, generator=draw), spec, rank, sample, center)
