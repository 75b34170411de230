"""The Nunchaku dialect as files: one file of v1 or v2 names, or the oldest form, a folder of two files.

What a linear looks like inside is in nunchaku_linear.py. Header metadata holds JSON texts: `config` (diffusers),
`comfy_config`, `model_class` and `quantization_config`. A reader needs none of them; where they disagree with the
tensors on precision or rank, the tensors win.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..svdquant.core.weights import LinearWeights
from .checkpoint import Checkpoint, LayerInfo, assemble, group_keys, json_object
from .nunchaku_linear import FIELDS, V1, V2, Names, decode_fields, decode_linear, describe, encode_linear
from .tensorfile import TensorFile
from .writer import Progress, write_checkpoint

__all__ = ["V1", "V2", "Names", "copy", "decode_linear", "detect", "encode_linear", "read", "write"]

FOLDER_FILES = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
FOLDER_TEXTS = {"config": "config.json", "comfy_config": "comfy_config.json"}

WRITTEN = ("nunchaku_v1", "nunchaku_v2", "nunchaku_folder", "nunchaku_t5")  # the dialects that `copy` copies

_V2_CLASSES = ("NunchakuQwenImageTransformer2DModel", "NunchakuZImageTransformer2DModel")
_V2_PARTS = (".img_mlp.", ".txt_mlp.", ".feed_forward.")
_V1_WITHOUT_BIAS = ("NunchakuSDXLUNet2DConditionModel", "NunchakuSanaTransformer2DModel")
_WEIGHT_DTYPES = {"int4": "int4", "nvfp4": "fp4_e2m1_all"}


def detect(files: TensorFile) -> bool:
    """Whether any tensor is called `X.qweight`."""
    return any(name.endswith(".qweight") for name in files)


def read(files: TensorFile) -> Checkpoint:
    """Describe every quantized layer of a Nunchaku file or folder; decode none."""
    info = describe_layers(files)
    warnings = metadata_warnings(files.metadata, info)
    return assemble(files, _dialect(files), info, decode, warnings=warnings)


def describe_layers(files: TensorFile) -> dict[str, LayerInfo]:
    """Every quantized layer's LayerInfo. ValueError for a layer that is incomplete or contradicts itself."""
    layers = group_keys(files, FIELDS, "qweight")
    try:
        return {layer: describe(files, layer, keys) for layer, keys in layers.items()}
    except ValueError as error:
        stated, _ = stated_format(files.metadata)
        note = f" (Its metadata says weights are {stated}.)" if stated else ""
        raise ValueError(f"{error}{note}") from None


def decode(tensors: Mapping[str, Tensor], info: LayerInfo) -> LinearWeights:
    """One layer from its stored tensors by field."""
    return decode_fields(tensors, info.spec)


def _dialect(files: TensorFile) -> str:
    if files.path.is_dir():
        return "nunchaku_folder"
    is_v2 = any(name.endswith((f".{V2.down}", f".{V2.smooth}")) for name in files)
    return "nunchaku_v2" if is_v2 else "nunchaku_v1"


def metadata_warnings(metadata: Mapping[str, str], info: Mapping[str, LayerInfo]) -> Iterator[str]:
    """Where `quantization_config` and the tensors disagree; the tensors win."""
    dtype, rank = stated_format(metadata)
    w4a4 = [layer for layer in info.values() if layer.spec.format in _WEIGHT_DTYPES]
    if not w4a4:
        return
    formats = {_WEIGHT_DTYPES[layer.spec.format] for layer in w4a4}
    if dtype and {dtype} != formats:
        yield f"metadata says weights are {dtype}, the tensors are {'/'.join(sorted(formats))}; tensors win."
    found = _common_rank(w4a4)
    if rank and rank != found:
        yield f"metadata says rank {rank}, the tensors have rank {found}; tensors win."


def stated_format(metadata: Mapping[str, str]) -> tuple[str | None, int | None]:
    """Weight dtype and rank as `quantization_config` states them, None where it does not."""
    settings = _settings(metadata)
    weight, rank = settings.get("weight"), settings.get("rank")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    return dtype if isinstance(dtype, str) else None, rank if isinstance(rank, int) else None


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    return json_object(metadata.get("quantization_config", ""))


def _common_rank(layers: list[LayerInfo]) -> int:
    return Counter(layer.rank for layer in layers).most_common(1)[0][0]


def folder_texts(folder: Path) -> dict[str, str]:
    """A folder's JSON files under the names that the header's metadata has for them."""
    found = {key: folder / name for key, name in FOLDER_TEXTS.items()}
    return {
        key: file.read_text(encoding="utf-8", errors="replace")
        for key, file in found.items()
        if file.is_file()
    }


def names_for(metadata: Mapping[str, str], layers: Mapping[str, Any]) -> Names:
    """V2 for Qwen-Image and Z-Image, whose engines expect it; V1 for all others."""
    if "model_class" in metadata:
        return V2 if metadata["model_class"] in _V2_CLASSES else V1
    return V2 if any(part in name for name in layers for part in _V2_PARTS) else V1


def write(
    path: Path,
    layers: Mapping[str, LinearWeights],
    plain: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    names: Names | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a single Nunchaku file; `quantization_config` is made from the layers.

    names     V1 or V2; by the model when not given
    The rest as in writer.write_checkpoint.
    """
    names = names or names_for(metadata, layers)
    zero_bias = names is V1 and metadata.get("model_class") not in _V1_WITHOUT_BIAS
    strings = {key: value for key, value in metadata.items() if key != "quantization_config"}
    source = _settings(metadata)  # some settings (skip_refiners) are not in the tensors

    def encode(weights: LinearWeights) -> dict[str, Tensor]:
        if weights.spec.format != "awq" and "quantization_config" not in strings:
            strings["quantization_config"] = json.dumps({**source, **quantization_config(weights)})
        return encode_linear(weights, names, zero_bias=zero_bias)

    write_checkpoint(path, layers, plain, strings, encode, progress=progress)


def copy(path: Path, checkpoint: Checkpoint) -> None:
    """Write a Nunchaku checkpoint as one file, every tensor's bytes untouched; states the format if nothing did."""
    w4a4 = [layer for layer in checkpoint.info.values() if layer.spec.format != "awq"]
    stated = {"quantization_config": json.dumps(quantization_config(w4a4[0]))} if w4a4 else {}
    write_checkpoint(path, {}, checkpoint.stored, {**stated, **checkpoint.metadata}, encode_linear)


def quantization_config(weights: LinearWeights | LayerInfo) -> dict[str, Any]:
    """The metadata that goes with a W4A4 layer's format and rank."""
    is_fp4 = weights.spec.format == "nvfp4"
    scale = "fp8_e4m3_nan" if is_fp4 else None
    shared = {"dtype": _WEIGHT_DTYPES[weights.spec.format], "scale_dtype": scale}
    weight = {**shared, "group_size": weights.spec.group}
    return {
        "method": "svdquant",
        "weight": {**weight, "scale_dtype": [None, scale] if is_fp4 else None},
        "activation": weight,
        "rank": -(-weights.rank // 16) * 16,
    }
