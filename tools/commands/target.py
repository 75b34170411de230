"""The name of a file that a command is to write."""

from __future__ import annotations

from pathlib import Path


def check_name(target: Path) -> None:
    """ValueError for a file that ComfyUI would not list."""
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"{target}: expected the name of a file ending in .safetensors. Add it.")
