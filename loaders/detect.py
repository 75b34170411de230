"""From a path to a Checkpoint: open the header, find the dialect, let its reader describe the layers.

A folder, or any one file of a folder checkpoint, opens the whole folder. A file without a single SVDQuant layer
is explained: what it is and which node loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from . import kitchen, natural, nunchaku, nunchaku_lite, nunchaku_t5
from .checkpoint import Checkpoint
from .tensorfile import TensorFile, join_files, open_file

DIALECTS = (nunchaku_lite, nunchaku_t5, nunchaku, kitchen, natural)
_LORA_PARTS = (
    "lora_A",
    "lora_B",
    "lora_down",
    "lora_up",
    "lora_k",
    "alpha",
    "dora_scale",
    "hada_w1_a",
    "lokr_w1",
)

# Names that only such a file has, what it is, and who takes it.
TEXT_ENCODER = (
    r"text_model\.(encoder|embeddings)\.|encoder\.block\.\d+\.layer\.|shared\.weight|"
    r"(model\.)?(language_model\.)?embed_tokens\."
)
_OTHERS = (
    (
        r"(first_stage_model|cond_stage_model|conditioner|text_encoders)\.",
        "a whole 16-bit checkpoint. Load it with ComfyUI's Load Checkpoint, or make it smaller with SVDQuant Quantize.",
    ),
    (
        TEXT_ENCODER,
        "a 16-bit text encoder. Load it with ComfyUI's Load CLIP or DualCLIPLoader.",
    ),
    (
        r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|conv1|conv_out|mid|middle|up|down)\b",
        "a VAE. Load it with ComfyUI's Load VAE.",
    ),
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a quantized model file or folder, reading headers only.

    Raises ValueError, in one sentence for a user, when the path holds something else or is damaged.
    """
    files = open_tensors(Path(path))
    found = read_quantized(files)
    if found is None:
        raise ValueError(f"{files.path.name}: expected SVDQuant layers, got {explain(files)}")
    return found


def read_quantized(files: TensorFile) -> Checkpoint | None:
    """What the first dialect that knows these tensors makes of them; None if they are not quantized."""
    dialect = next((dialect for dialect in DIALECTS if dialect.detect(files)), None)
    return dialect.read(files) if dialect else None


def open_tensors(path: Path) -> TensorFile:
    """All tensors of a file, of a folder checkpoint, or of the folder that a file is part of."""
    if path.is_dir():
        return _open_folder(path)
    if path.name in nunchaku.FOLDER_FILES or nunchaku_lite.is_folder(path.parent):
        return _open_folder(path.parent)
    return open_file(path)


def _open_folder(folder: Path) -> TensorFile:
    folder = folder.absolute()  # so that "." has a name to speak of
    if nunchaku_lite.is_folder(folder / "transformer"):  # a whole diffusers pipeline
        folder = folder / "transformer"
    if nunchaku_lite.is_folder(folder):
        files = nunchaku_lite.folder_files(folder)
    else:
        files = _nunchaku_files(folder)
    opened = join_files(folder, files)
    opened.metadata |= nunchaku.folder_texts(folder)
    return opened


def _nunchaku_files(folder: Path) -> list[Path]:
    files = [folder / name for name in nunchaku.FOLDER_FILES]
    absent = [file.name for file in files if not file.is_file()]
    if len(absent) == 1:
        raise ValueError(
            f"{folder.name}: expected {absent[0]} in {folder}, got none. Download the whole folder."
        )
    if absent:
        raise ValueError(
            f"{folder.name}: expected {' and '.join(absent)}, or a nunchaku_lite config.json, in the folder, "
            "got neither. Give a .safetensors file."
        )
    return files


def explain(files: TensorFile) -> str:
    """What a file without SVDQuant layers is, and what to do with it."""
    if not files:
        return "a file without tensors. Download it again."
    if any(".mlp_fc" in name or "mlp_context_fc1" in name for name in _lora_names(files)):
        return "a LoRA in Nunchaku layout, tied to one base model. Use the original LoRA file."
    if is_lora(files):
        return "a LoRA. Load it with SVDQuant Apply LoRA or ComfyUI's Load LoRA."
    if any(name.endswith(".comfy_quant") for name in files):
        return (
            "a model in one of ComfyUI's own quantized formats. Load it with ComfyUI's Load Diffusion Model."
        )
    for marks, what in _OTHERS:
        if any(re.match(marks, name) for name in files):
            return what
    return "none: an ordinary 16-bit model. Load it with ComfyUI's Load Diffusion Model (UNETLoader)."


def is_lora(names: Iterable[str]) -> bool:
    """Whether most of a file's tensors are parts of LoRAs."""
    names = list(names)
    return 2 * len(_lora_names(names)) > len(names)


def _lora_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if any(part in name.split(".") for part in _LORA_PARTS)]
