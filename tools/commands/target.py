"""The file that a command is to write."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def check_target(target: Path, sources: Iterable[Path], *, overwrite: bool) -> None:
    """ValueError for a file that ComfyUI would not list, that is there already, or that is being read.

    sources   what the command reads: writing must not pull it from under its own memory map
    """
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"{target}: expected the name of a file ending in .safetensors. Add it.")
    if not target.exists():
        return
    if any(source.exists() and target.samefile(source) for source in sources):
        raise ValueError(f"{target.name}: expected a new file, got the source itself. Name another file.")
    if not overwrite:
        raise ValueError(
            f"{target}: expected a new file, got one that is there. Name another, or add --overwrite."
        )
