"""Write a checkpoint in another dialect, one layer in memory at a time, cropped where the family is known."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ...loaders.detect import open_checkpoint
from ...svdquant.adapters.convert import WRITERS, convert
from ...svdquant.adapters.families import resolve
from .target import add_overwrite, check_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint file or folder")
    parser.add_argument("target", metavar="DST", type=Path, help="the .safetensors file to write")
    parser.add_argument("--to", required=True, choices=WRITERS, help="the dialect to write")
    add_overwrite(parser)


def main(args: argparse.Namespace) -> int:
    started = time.monotonic()
    checkpoint = open_checkpoint(args.source)
    sources = {info.file for info in checkpoint.stored.info.values()}
    check_target(args.target, sources, overwrite=args.overwrite)
    for warning in checkpoint.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if resolve(checkpoint) is None:
        print("warning: family unknown: sizes stay as stored, act shifts as stated", file=sys.stderr)
    convert(checkpoint, args.target, args.to, progress=show)
    size, seconds = args.target.stat().st_size / 2**20, time.monotonic() - started
    print(f"{args.target}: {args.to}, {len(checkpoint.info)} layers, {size:.1f} MB in {seconds:.1f} s")
    return 0


def show(name: str, done: int, total: int) -> None:
    """One line on a terminal, rewritten; nothing in a log."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{done}/{total}  {name}", end=end, file=sys.stderr, flush=True)
