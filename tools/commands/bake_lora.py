"""Fold LoRAs into the branch of a checkpoint: a new file with more rank, the 4-bit weights untouched."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ...svdquant.adapters.baking.bake import LIMIT, bake
from .target import add_overwrite, check_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="a checkpoint, file or folder")
    parser.add_argument(
        "loras", metavar="LORA[:STRENGTH]", nargs="+", help="LoRA files; strength 1 where none is given"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the .safetensors file to write")
    parser.add_argument(
        "--error",
        type=float,
        default=LIMIT,
        help=f"largest relative error of what is not low-rank, {LIMIT:g} by default",
    )
    add_overwrite(parser)


def main(args: argparse.Namespace) -> int:
    started = time.monotonic()
    loras = [parse(lora) for lora in args.loras]
    check_target(args.target, [args.base, *(path for path, _ in loras)], overwrite=args.overwrite)
    baked = bake(args.base, loras, args.target, limit=args.error, overwrite=args.overwrite, progress=show)
    size, seconds = args.target.stat().st_size / 2**20, time.monotonic() - started
    print(f"{baked}; {size:.1f} MB in {seconds:.1f} s")
    return 0


def parse(argument: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH; a drive letter's colon is not taken for one."""
    name, colon, strength = argument.rpartition(":")
    if not colon or strength.lower().endswith(".safetensors"):
        return Path(argument), 1.0
    try:
        return Path(name), float(strength)
    except ValueError:
        raise ValueError(f"{argument}: expected a number after the colon, got {strength!r}.") from None


def show(done: int, total: int) -> None:
    """One line on a terminal, rewritten; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
