"""A 16-bit text encoder becomes a 4-bit one, a linear in memory at a time, from its weights alone.

T5-XXL is written like the published file (published_t5.py), every other encoder in the natural layout under its own
names: what is not quantized keeps its bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ...loaders import natural
from ...loaders.checkpoint import Lazy
from ...loaders.encoders import QUANTIZED, Encoder, recognise
from ...loaders.source import SourceModel
from ..core.weights import LinearWeights
from . import awq, published_t5

Progress = Callable[[str, int, int, float | None], None]
GROUPS = (128, 64)


def quantize(
    source: SourceModel,
    target: Path,
    *,
    group: int = GROUPS[0],
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, float]:
    """Write the encoder with its linears in AWQ W4A16.

    group     columns that share a scale: 128 or 64
    progress  called with (name, linears done, linears in all, its relative error)
    returns   relative error of every linear's weight

    Raises ValueError for another model, for a tensor that is damaged or fits no group, and for a full disk.
    """
    encoder = _encoder(source)
    if group not in GROUPS:
        raise ValueError(f"group: expected {' or '.join(map(str, GROUPS))}, got {group}.")
    linears = linears_of(source, encoder)
    errors: dict[str, float] = {}

    def make(name: str) -> LinearWeights:
        weights, errors[name] = _quantized(source, name, group, device)
        return weights

    def report(name: str, done: int, total: int) -> None:
        if progress:
            progress(name, done, total, errors[name])

    write = published_t5.write if encoder.name == "T5" and group == GROUPS[0] else _write_natural
    write(source, target, Lazy(linears, make), progress=report)
    return errors


def linears_of(source: SourceModel, encoder: Encoder) -> list[str]:
    """Names of the linears that are quantized, in the source's order."""
    wanted = re.compile(rf"({encoder.linears})\.weight")
    return [name.removesuffix(".weight") for name in source.shapes if wanted.fullmatch(name)]


def _encoder(source: SourceModel) -> Encoder:
    encoder = recognise(source.shapes)
    if encoder is None:
        raise ValueError(
            f"{source.path.name}: expected a text encoder ({', '.join(QUANTIZED)}), got none of their layers. Choose "
            "another file; a diffusion model is quantized with SVDQuant Quantize."
        )
    if not encoder.linears:
        raise ValueError(
            f"{source.path.name}: expected one of {', '.join(QUANTIZED)}, got {encoder.name}. "
            "Use it as it is, or in ComfyUI's fp8."
        )
    return encoder


def _quantized(source: SourceModel, name: str, group: int, device: str) -> tuple[LinearWeights, float]:
    weight = source.tensors[f"{name}.weight"].float()
    bias = source.tensors[f"{name}.bias"] if f"{name}.bias" in source.shapes else None
    n, k = weight.shape
    group = group if k % group == 0 else GROUPS[-1]
    if n % 4 or k % group:
        raise ValueError(
            f"{source.path.name}: {name}: expected rows in fours and columns in groups of {group}, got {n} x {k}. "
            "An encoder of this width cannot be quantized."
        )
    try:
        weights, error = awq.quantize_weight(weight.to(device), group)
    except ValueError as problem:
        raise ValueError(f"{source.path.name}: {name}: {problem}") from None
    tensors = {field: t.cpu() for field, t in weights.tensors().items()}
    return LinearWeights(weights.spec, **tensors, bias=bias), error


def _write_natural(
    source: SourceModel, target: Path, layers: Lazy[LinearWeights], *, progress: Callable
) -> None:
    used = {f"{name}.{tail}" for name in layers for tail in ("weight", "bias")}
    plain: Mapping[str, Tensor] = Lazy((n for n in source.shapes if n not in used), source.finite)
    metadata = {"svdquant": json.dumps({"recipe": "awq", "text_encoder": recognise(source.shapes).name})}
    natural.write(target, layers, plain, metadata, packed=True, progress=progress)
