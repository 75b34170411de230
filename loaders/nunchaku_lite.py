"""The diffusers "nunchaku_lite" dialect: a diffusers folder whose config.json names the quantized layers.

    quantization_config = {quant_method: "nunchaku_lite", svdq_w4a4: {precision, group_size, rank, targets},
                           awq_w4a16: {precision, group_size, targets}}

Tensors are Nunchaku's with v2 names, but q, k and v stay apart, there is no `smooth_factor_orig`, and NVFP4
layers have both second-level scales. Read only: diffusers writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, LayerInfo, assemble, json_object
from .nunchaku import decode, describe_layers
from .nunchaku_linear import V2
from .tensorfile import TensorFile

CONFIG = "config.json"
METHOD = "nunchaku_lite"
W4A4, AWQ = "svdq_w4a4", "awq_w4a16"
_PRECISIONS = {"int4": "int4", "nvfp4": "nvfp4", "fp4": "nvfp4"}


def detect(files: TensorFile) -> bool:
    """Whether config.json says so, or the tensors have v2 names without the original smoothing vectors."""
    tails = {name.rpartition(".")[2] for name in files}
    if "qweight" not in tails:
        return False
    said = bool(_settings(files.metadata.get("config", "{}")))
    return said or (V2.smooth in tails and V2.smooth_orig not in tails)


def read(files: TensorFile) -> Checkpoint:
    """Describe every quantized layer of a nunchaku_lite folder or file; decode none."""
    info = describe_layers(files)
    settings = _settings(files.metadata.get("config", "{}"))
    return assemble(files, METHOD, info, decode, warnings=_warnings(settings, info))


def _settings(config: str) -> dict[str, Any]:
    """quantization_config of a config.json text when it is ours, else {}."""
    settings = json_object(config).get("quantization_config")
    return settings if isinstance(settings, dict) and settings.get("quant_method") == METHOD else {}


def _warnings(settings: Mapping[str, Any], info: Mapping[str, LayerInfo]) -> Iterator[str]:
    w4a4 = {name: layer for name, layer in info.items() if layer.spec.format != "awq"}
    stated, rank = (
        _stated(settings, W4A4, field, kind) for field, kind in (("precision", str), ("rank", int))
    )
    stated = _PRECISIONS.get(stated, stated)
    formats = {layer.spec.format for layer in w4a4.values()}
    if stated and formats - {stated}:
        yield f"config.json says precision {stated}, the tensors are {'/'.join(sorted(formats))}; tensors win."
    ranks = {layer.rank for layer in w4a4.values()}
    if rank and ranks - {rank}:
        yield f"config.json says rank {rank}, the tensors have {sorted(ranks)}; tensors win."
    targets = [name for part in (W4A4, AWQ) for name in _stated(settings, part, "targets", list) or ()]
    absent = [name for name in targets if isinstance(name, str) and name not in info]
    if absent:
        yield f"config.json lists {len(absent)} layers the file does not quantize (first: {absent[0]})."


def _stated(settings: Mapping[str, Any], part: str, field: str, kind: type) -> Any:
    """What the settings of one precision say, None where they do not or it is nothing of that kind."""
    inside = settings.get(part)
    value = inside.get(field) if isinstance(inside, dict) else None
    return value if isinstance(value, kind) else None


def is_folder(folder: Path) -> bool:
    """Whether a folder's config.json names this dialect."""
    config = folder / CONFIG
    return config.is_file() and bool(_settings(config.read_text(encoding="utf-8", errors="replace")))


def folder_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all that its index lists. ValueError for one that is not there."""
    found = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        found = [folder / name for name in _indexed(indexes[0])]
    absent = [file.name for file in found if not file.is_file()]
    if absent or not found:
        what = ", ".join(absent) or "a .safetensors file"
        raise ValueError(f"{folder.name}: expected {what} in {folder}, got none. Download the whole folder.")
    return found


def _indexed(index: Path) -> list[str]:
    try:
        names = set(json_object(index.read_bytes())["weight_map"].values())
        return sorted(Path(name).name for name in names)
    except (KeyError, AttributeError, TypeError):
        raise ValueError(
            f"{index.name}: expected JSON with a weight_map of tensor names to files, got something else. "
            "Download the file again."
        ) from None
