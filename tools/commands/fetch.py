"""Bring a published 4-bit checkpoint into ComfyUI's model folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from ...loaders import hub

_PACK = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", help="a published name, or owner/repo/file.safetensors[@revision]"
    )
    parser.add_argument("--list", action="store_true", help="show the published names and stop")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to put it (ComfyUI's folder for its kind)"
    )
    parser.add_argument("--verify", action="store_true", help="hash a file that is already there")


def main(args: argparse.Namespace) -> int:
    if args.list:
        for entry in hub.PUBLISHED.values():
            print(f"{entry.name:32} {entry.folder:17} {entry.source}")
        return 0
    if args.source is None:
        raise ValueError("fetch: expected a name or a file of a repository. --list shows the names.")
    disable_progress_bars()  # the client's own: one bar is enough
    hub.parse(args.source)  # a wrong name is said before a missing folder
    folder = args.folder or models_folder(args.source)
    print(hub.fetch(args.source, folder, progress=Bar(), verify=args.verify))
    return 0


def models_folder(source: str) -> Path:
    """ComfyUI's folder for a published checkpoint: of COMFYUI_PATH, or of the ComfyUI this pack is installed in.

    Raises ValueError where there is none.
    """
    home = Path(os.environ.get("COMFYUI_PATH") or _PACK.parents[1])
    if not (home / "models").is_dir():
        raise ValueError(
            f"fetch: expected a ComfyUI with a models folder, got none at {home}. Say where it is with COMFYUI_PATH, "
            "where the file goes with --folder, or clone this pack into ComfyUI/custom_nodes."
        )
    kind = hub.PUBLISHED[source].folder if source in hub.PUBLISHED else "diffusion_models"
    return home / "models" / kind


class Bar:
    """One line on the terminal, twice a second; nothing where there is none."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        began, first = self._start = self._start or (now, done)
        if not sys.stderr.isatty() or (done < total and now - self._shown < 0.5):
            return
        self._shown = now
        speed = (done - first) / max(now - began, 1e-3) / 1e6
        end = "\n" if done == total else ""
        line = (
            f"{100 * done // max(total, 1):3d} %  {done / 1e9:.2f} of {total / 1e9:.2f} GB  {speed:.0f} MB/s"
        )
        print(f"\r{line:60}", end=end, file=sys.stderr, flush=True)
