"""Write a checkpoint in another dialect, one layer in memory at a time, cropped where the family is known."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ...loaders import kitchen, natural, nunchaku
from ...loaders.checkpoint import Checkpoint, Lazy
from ...loaders.detect import open_checkpoint
from ...loaders.writer import Progress
from ...svdquant.adapters.families import Role, apply_role, resolve
from ...svdquant.core.weights import LinearWeights

WRITERS = {"nunchaku": nunchaku.write, "kitchen": kitchen.write, "natural": natural.write}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint file or folder")
    parser.add_argument("target", metavar="DST", type=Path, help="the .safetensors file to write")
    parser.add_argument("--to", required=True, choices=WRITERS, help="the dialect to write")


def main(args: argparse.Namespace) -> int:
    started = time.monotonic()
    checkpoint = open_checkpoint(args.source)
    check_target(checkpoint, args.target)
    for warning in checkpoint.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    convert(checkpoint, args.target, args.to, progress=show)
    size, seconds = args.target.stat().st_size / 2**20, time.monotonic() - started
    print(f"{args.target}: {args.to}, {len(checkpoint.info)} layers, {size:.1f} MB in {seconds:.1f} s")
    return 0


def check_target(checkpoint: Checkpoint, target: Path) -> None:
    """Writing must not pull the source from under its own memory map."""
    sources = {info.file for info in checkpoint.stored.info.values()}
    if target.exists() and any(target.samefile(source) for source in sources):
        raise ValueError(f"{target.name}: expected a new file, got the source itself. Name another file.")


def convert(checkpoint: Checkpoint, target: Path, dialect: str, *, progress: Progress | None = None) -> None:
    """Write `checkpoint` to `target` in a dialect of WRITERS.

    A Nunchaku checkpoint written as Nunchaku (a folder made one file) keeps every tensor's bytes. Raises ValueError
    where the dialect cannot hold a layer, before anything is written.
    """
    if dialect == "nunchaku" and checkpoint.dialect in nunchaku.WRITTEN:
        nunchaku.copy(target, checkpoint)
        return
    if dialect == "kitchen":
        refuse_nvfp4(checkpoint)
    options = {"names": nunchaku.V2} if (dialect, checkpoint.dialect) == ("nunchaku", "nunchaku_lite") else {}
    layers = true_layers(checkpoint)
    WRITERS[dialect](target, layers, checkpoint.plain, checkpoint.metadata, progress=progress, **options)


def refuse_nvfp4(checkpoint: Checkpoint) -> None:
    fp4 = [name for name, layer in checkpoint.info.items() if layer.spec.format == "nvfp4"]
    if fp4:
        raise ValueError(
            f"{checkpoint.path.name}: {fp4[0]}: expected INT4 layers, got NVFP4 ({len(fp4)} layers): kitchen has no "
            "NVFP4 SVDQuant. Convert to nunchaku or natural instead."
        )


def true_layers(checkpoint: Checkpoint) -> Mapping[str, LinearWeights]:
    """The layers with what the family knows of them: true sizes, unsigned activations."""
    family = resolve(checkpoint)
    roles = family.roles(checkpoint) if family else {}
    if not family:
        print("warning: family unknown: sizes stay as stored, act shifts as stated", file=sys.stderr)
    return Lazy(checkpoint.layers, lambda name: apply_role(checkpoint.layers[name], roles.get(name, Role())))


def show(name: str, done: int, total: int) -> None:
    """One line on a terminal, rewritten; nothing in a log."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{done}/{total}  {name}", end=end, file=sys.stderr, flush=True)
