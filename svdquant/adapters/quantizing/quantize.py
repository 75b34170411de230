"""The host's side of quantizing: where the file goes, which device works, and a progress bar that can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management

from .. import folders


def target(name: str, kind: str = folders.MODELS) -> Path:
    """The file to write in one of the host's folders; folders in the name are made.

    Raises ValueError for a name that is empty or leads out of the folder.
    """
    name = name.strip().removesuffix(".safetensors")
    relative = Path(f"{name}.safetensors")
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"file name: expected a name inside {kind}, such as my-model-int4, got {name!r}.")
    path = folders.download_folder(kind) / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def device() -> str:
    """Where the host computes."""
    return str(comfy.model_management.get_torch_device())


def progress() -> Callable[..., None]:
    """A callback for the quantizer that moves the host's bar and stops when the user interrupts."""
    show = folders.show_progress()

    def report(name: str, done: int, total: int, error: float | None = None) -> None:
        show(done, total)

    return report
