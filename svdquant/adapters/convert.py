"""Write a checkpoint in another dialect, one layer in memory at a time, cropped where the family is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...loaders import encoders, kitchen, natural, nunchaku
from ...loaders.checkpoint import Checkpoint, Lazy
from ...loaders.writer import Progress
from ..core.weights import LinearWeights
from .conventions import ENGINE_DIALECTS, straighten, to_engine
from .families import Role, apply_role, resolve
from .family import Names

WRITERS = {"nunchaku": nunchaku.write, "kitchen": kitchen.write, "natural": natural.write}


def convert(checkpoint: Checkpoint, target: Path, dialect: str, *, progress: Progress | None = None) -> None:
    """Write `checkpoint` to `target` in a dialect of WRITERS.

    A Nunchaku checkpoint written as Nunchaku (a folder made one file) keeps every tensor's bytes. Raises ValueError
    where the dialect cannot hold a layer, before anything is written.
    """
    if dialect == "nunchaku" and checkpoint.dialect in nunchaku.WRITTEN:
        nunchaku.copy(target, checkpoint)
        return
    if dialect != "natural":
        refuse_encoder(checkpoint, dialect)
    if dialect == "kitchen":
        refuse_nvfp4(checkpoint)
    options = {"names": nunchaku.V2} if (dialect, checkpoint.dialect) == ("nunchaku", "nunchaku_lite") else {}
    layers = true_layers(checkpoint, engine=dialect != "kitchen")
    WRITERS[dialect](target, layers, checkpoint.plain, checkpoint.metadata, progress=progress, **options)


def refuse_encoder(checkpoint: Checkpoint, dialect: str) -> None:
    """In other dialects 4-bit weights without a branch are modulations, and an encoder's would be read as such."""
    encoder = encoders.recognise(checkpoint.stored)
    if encoder:
        raise ValueError(
            f"{checkpoint.path.name}: expected a diffusion model, got a text encoder ({encoder.name}), which {dialect} "
            "files do not hold. SVDQuant Load Text Encoder reads it as it is."
        )


def refuse_nvfp4(checkpoint: Checkpoint) -> None:
    fp4 = [name for name, layer in checkpoint.info.items() if layer.spec.format == "nvfp4"]
    if fp4:
        raise ValueError(
            f"{checkpoint.path.name}: {fp4[0]}: expected INT4 layers, got NVFP4 ({len(fp4)} layers): kitchen has no "
            "NVFP4 SVDQuant. Convert to nunchaku or natural instead."
        )


def true_layers(checkpoint: Checkpoint, *, engine: bool) -> Mapping[str, LinearWeights]:
    """The layers with what the family knows of them: true sizes, unsigned activations, rows in the order asked for.

    engine   whether to follow the engine's conventions or the model's own, see conventions.py
    """
    family = resolve(checkpoint)
    roles = family.roles(Names(checkpoint.info, checkpoint.plain_info)) if family else {}
    followed = checkpoint.dialect in ENGINE_DIALECTS

    def true(name: str) -> LinearWeights:
        role, weights = roles.get(name, Role()), checkpoint.layers[name]
        if not followed:
            cropped = apply_role(weights, replace(role, act_shift=0.0))
            return to_engine(cropped, role.splits, role.act_shift) if engine else cropped
        weights = apply_role(weights, role)
        return weights if engine or not role.splits else straighten(weights, role.splits)

    return Lazy(checkpoint.layers, true)
