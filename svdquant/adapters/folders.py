"""Where the host keeps models, and the pack's own demo models among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODELS, LORAS, TEXT_ENCODERS = "diffusion_models", "loras", "text_encoders"


def register_demo() -> None:
    """Let the host's file lists show the demo model and its LoRA, after the user's own files."""
    for kind in (MODELS, LORAS):
        folder_paths.add_model_folder_path(kind, str(DEMO / kind), is_default=False)


def names(kind: str) -> list[str]:
    """The files of one of the host's model folders, as its own loaders list them."""
    return folder_paths.get_filename_list(kind)


def kind_of(name: str) -> str:
    """The kind of a file that was chosen from the lists of diffusion models and of text encoders."""
    return TEXT_ENCODERS if name in names(TEXT_ENCODERS) and name not in names(MODELS) else MODELS


def find(kind: str, name: str) -> Path:
    """The file behind a name in one of the host's folders.

    Raises ValueError for a name that leads out of the folders or does not exist.
    """
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    path = folder_paths.get_full_path(kind, name) if inside else None
    if path is None:
        raise ValueError(
            f"{name}: not in ComfyUI's {kind} folders ({', '.join(folder_paths.get_folder_paths(kind))}). "
            "Put the file there and refresh the node list."
        )
    return Path(path)


def download_folder(kind: str) -> Path:
    """Where a downloaded model of this kind belongs: the host's folder of that name, if it has one."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(kind)]
    return next((path for path in paths if path.name == kind), paths[0])


def show_progress() -> Callable[[int, int], None]:
    """A (done, total) callback that moves the host's progress bar and stops when the user interrupts."""
    bar: list[comfy.utils.ProgressBar] = []

    def report(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not bar:
            bar.append(comfy.utils.ProgressBar(total))
        bar[0].update_absolute(done, total)

    return report
