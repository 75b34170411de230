"""The host's side of quantizing: where the file goes, which device works, and a progress bar that can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management

from ....loaders.writer import UNPORTABLE
from .. import folders
from ..devices import able


def target(name: str, kind: str = folders.MODELS) -> Path:
    """The file to write in one of the host's folders; folders in the name are made, whichever slash parts them.

    Raises ValueError for a name that is empty, that leads out of the folder, that some systems cannot store, or that
    is taken: hours of work, or the source itself, may be in that file.
    """
    name = name.strip().replace("\\", "/").removesuffix(".safetensors")
    relative = Path(f"{name}.safetensors")
    outside = (
        not relative.name.removesuffix(".safetensors") or relative.is_absolute() or ".." in relative.parts
    )
    if outside or UNPORTABLE & set(name):
        raise ValueError(
            f"file name: expected a name inside {kind}, such as my-model-int4, without any of "
            f"{' '.join(sorted(UNPORTABLE))}, got {name!r}. Change file_name."
        )
    path = folders.download_folder(kind) / relative
    if path.exists():
        raise ValueError(
            f"{path}: expected a new file, got one that is there. Change file_name, or delete it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def device() -> str:
    """Where the host computes, if all that a recipe needs is there."""
    return str(able(comfy.model_management.get_torch_device()))


def progress() -> Callable[..., None]:
    """A callback for the quantizer that moves the host's bar and stops when the user interrupts."""
    show = folders.show_progress()

    def report(name: str, done: int, total: int, error: float | None = None) -> None:
        show(done, total)

    return report
