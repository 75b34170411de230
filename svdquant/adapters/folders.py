"""Where the host keeps models, and the pack's own demo models among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import comfy.model_management
import comfy.utils
import folder_paths

from ...loaders.published import PUBLISHED

DEMO = Path(__file__).resolve().parents[2] / "demo"
# Names that many models share: only their folder tells them apart.
NAMELESS = {
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "pytorch_lora_weights.safetensors",
    "transformer_blocks.safetensors",
    "unquantized_layers.safetensors",
}
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

    A workflow made elsewhere may have the file in another folder, or its path with the other slash: then the one file
    of that name is taken.

    Raises ValueError for a name that leads out of the folders, does not exist, or could be several files.
    """
    return _path(kind, name) or _elsewhere(kind, name)


def _path(kind: str, name: str) -> Path | None:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    path = folder_paths.get_full_path(kind, name) if inside else None
    return Path(path) if path else None


def _elsewhere(kind: str, name: str) -> Path:
    """The one file that is called the same, whatever folder it is in."""
    wanted = PurePosixPath(name.replace("\\", "/"))
    listed = {PurePosixPath(other.replace("\\", "/")): other for other in names(kind)}
    same = [other for path, other in listed.items() if path == wanted]
    outside = wanted.is_absolute() or PureWindowsPath(name).drive or ".." in wanted.parts
    if not same and not outside and wanted.name not in NAMELESS:
        same = [other for path, other in listed.items() if path.name == wanted.name]
    found = {other: path for other in same if (path := _path(kind, other))}
    if len(found) == 1:
        return found.popitem()[1]
    if found:
        raise ValueError(
            f"{name}: expected one file of this name, got {', '.join(found)}. Choose one of them."
        )
    known = [entry.name for entry in PUBLISHED.values() if entry.source.endswith(f"/{wanted.name}")]
    fetch = f"bring it with SVDQuant Fetch Model, where it is {known[0]}" if known else "choose another"
    raise ValueError(
        f"{name or 'no name'}: not in ComfyUI's {kind} folders ({', '.join(folder_paths.get_folder_paths(kind))}). "
        f"Put the file there and press R, or {fetch}."
    )


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
