"""Where the set-up keeps things, and which ComfyUI is meant. Everything here can be moved by the environment.

| variable           | what it names                                            | without it          |
| ------------------ | -------------------------------------------------------- | ------------------- |
| SVDQUANT_VENV      | the virtual environment                                  | .venv               |
| SVDQUANT_HOSTS_DIR | the folder of ComfyUI trees, set-up log and browser tool | .hosts              |
| COMFYUI_PATH       | a ComfyUI tree of the user's own, used instead of ours   | the tree in .hosts  |
| COMFYUI_PYTHON     | the Python that runs that tree                           | the one in .venv    |

Standard library only: this is read before anything is installed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEWEST, OLDEST = "0.30.0", "0.16.3"  # what the demo runs on; the floor that pyproject.toml claims


class SetupError(RuntimeError):
    """Something the user can mend; the text is one sentence that says how."""


@dataclass(frozen=True)
class Host:
    """One ComfyUI: its tree, the Python that runs it, and the version its own file gives."""

    tree: Path
    python: Path
    version: str


def venv_dir() -> Path:
    return Path(os.environ.get("SVDQUANT_VENV") or ROOT / ".venv").absolute()


def hosts_dir() -> Path:
    return Path(os.environ.get("SVDQUANT_HOSTS_DIR") or ROOT / ".hosts").absolute()


def venv_python() -> Path:
    """The interpreter inside the environment; the file need not exist yet."""
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return venv_dir() / inside


def tree_dir(version: str) -> Path:
    return hosts_dir() / f"ComfyUI-{version}"


def host_at(tree: Path, python: Path) -> Host:
    """The ComfyUI in a folder; SetupError when the folder holds none."""
    tree = tree.expanduser().absolute()
    if not (tree / "main.py").is_file():
        raise SetupError(f"{tree}: expected a ComfyUI folder, found no main.py. Check the path.")
    return Host(tree, python.expanduser().absolute(), tree_version(tree))


def tree_version(tree: Path) -> str:
    """What comfyui_version.py says, or "unknown" for a tree older than that file."""
    file = tree / "comfyui_version.py"
    found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text()) if file.is_file() else None
    return found.group(1) if found else "unknown"


def users_host() -> Host | None:
    """The ComfyUI that COMFYUI_PATH names, or None when the variable is not set."""
    path = os.environ.get("COMFYUI_PATH")
    return host_at(Path(path), users_python() or venv_python()) if path else None


def users_python() -> Path | None:
    """COMFYUI_PYTHON, which counts only together with COMFYUI_PATH."""
    path = os.environ.get("COMFYUI_PYTHON") if os.environ.get("COMFYUI_PATH") else None
    if path and not Path(path).expanduser().is_file():
        raise SetupError(
            f"COMFYUI_PYTHON={path}: there is no such file. Name the Python that runs your ComfyUI."
        )
    return Path(path).expanduser().absolute() if path else None
