"""What every dialect is read into, and the checks and lookups that the readers share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..svdquant.core.weights import TENSOR_FIELDS, LinearWeights, QuantSpec
from .tensorfile import TensorFile, TensorInfo

T = TypeVar("T")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_TELLING = {"smooth", "down", "up", "zeros", "second_scale", "row_scale"}  # only quantized layers have these
READ_FIELDS = (*TENSOR_FIELDS, "row_scale")  # the others (smooth_orig, JSON) take no part in the mathematics


class Lazy(Mapping[str, T], Generic[T]):
    """Names known now, values made at every access and kept nowhere."""

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)


@dataclass(frozen=True)
class LayerInfo:
    """A quantized linear as the file's header describes it, before anything is decoded.

    spec          format and group; act_shift only where the file itself states it
    out_features  N as stored, padding included
    in_features   K as stored, padding included
    rank          R as stored, padding included
    nbytes        bytes in the file
    keys          field -> name in the file; the fields of LinearWeights and a dialect's own
    """

    spec: QuantSpec
    out_features: int
    in_features: int
    rank: int
    nbytes: int
    keys: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A quantized model file, opened.

    path        the file or folder
    dialect     nunchaku_v1 | nunchaku_v2 | nunchaku_folder | nunchaku_lite | nunchaku_t5 | kitchen | natural
    metadata    the header's strings (and a folder's config.json as "config")
    layers      name -> LinearWeights, decoded at every access; padding not yet cropped
    info        name -> LayerInfo, from headers alone
    plain       name -> Tensor, what is not part of a quantized layer, memory-mapped
    plain_info  name -> TensorInfo of the same
    stored      name -> Tensor, everything as the file holds it, memory-mapped
    warnings    what looked odd and does not matter
    """

    path: Path
    dialect: str
    metadata: Mapping[str, str]
    layers: Mapping[str, LinearWeights]
    info: Mapping[str, LayerInfo]
    plain: Mapping[str, Tensor]
    plain_info: Mapping[str, TensorInfo]
    stored: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()


Decode = Callable[[Mapping[str, Tensor], LayerInfo], LinearWeights]


def assemble(
    files: TensorFile,
    dialect: str,
    info: Mapping[str, LayerInfo],
    decode: Decode,
    *,
    warnings: Iterable[str] = (),
) -> Checkpoint:
    """Make the Checkpoint of a dialect from its layers' descriptions and its decoder."""
    used = {key for layer in info.values() for key in layer.keys.values()}
    others = [key for key in files if key not in used]
    strays = [key for key in others if key.rpartition(".")[0] in info]
    plain_info = {key: files.info[key] for key in others if key.rpartition(".")[0] not in info}
    return Checkpoint(
        path=files.path,
        dialect=dialect,
        metadata=files.metadata,
        layers=Lazy(info, lambda name: _decoded(files, name, info[name], decode)),
        info=info,
        plain=Lazy(plain_info, files.__getitem__),
        plain_info=plain_info,
        stored=files,
        warnings=(*warnings, *_describe_strays(strays)),
    )


def _describe_strays(strays: list[str]) -> Iterator[str]:
    by_tail: dict[str, list[str]] = {}
    for key in strays:
        by_tail.setdefault(key.rpartition(".")[2], []).append(key)
    for tail, keys in by_tail.items():
        yield f"{keys[0]}: a quantized layer has no {tail!r} tensor; {len(keys)} of this kind ignored."


def _decoded(files: TensorFile, name: str, info: LayerInfo, decode: Decode) -> LinearWeights:
    tensors = {field: files[key] for field, key in info.keys.items() if field in READ_FIELDS}
    for field, tensor in tensors.items():
        _check_finite(files, info.keys[field], field, tensor)
    try:
        return decode(tensors, info)
    except ValueError as error:
        raise ValueError(f"{files.path.name}: {name}: {error}") from None


def _check_finite(files: TensorFile, key: str, field: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise ValueError(
            f"{files.path.name}: {key}: expected finite numbers, got NaN or infinity. "
            "The file is damaged or its quantization failed; get another copy."
        )
    if field == "smooth" and bool((tensor == 0).any()):
        raise ValueError(
            f"{files.path.name}: {key}: expected no zero, since activations are divided by it, got one. "
            "The file is damaged or its quantization failed; get another copy."
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:  # it has no infinity, and NaN is all ones below the sign
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    # One NaN or infinity makes the sum one, and a sum is read several times faster; a finite file may still overflow it
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(torch.isfinite(tensor).all())


def group_keys(files: TensorFile, fields: Mapping[str, str], marker: str) -> dict[str, dict[str, str]]:
    """Sort a file's names into quantized layers: {layer: {field: name}}.

    fields   last part of a name -> field, e.g. "qweight" -> "codes"
    marker   the last part that makes a layer a quantized one

    Raises ValueError for a layer that has a field twice, or a branch or smoothing vector but no marker.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in files:
        layer, _, tail = name.rpartition(".")
        if tail in fields:
            group = groups.setdefault(layer, {})
            if fields[tail] in group:
                raise ValueError(
                    f"{files.path.name}: {name}: expected one tensor for {fields[tail]}, got also "
                    f"{group[fields[tail]]}. Two dialects are mixed; convert the file again from its source."
                )
            group[fields[tail]] = name
    layers = {layer: group for layer, group in groups.items() if fields[marker] in group}
    for layer, group in groups.items():
        if layer not in layers and _TELLING & set(group) and len(group.keys() - {"bias"}) > 1:
            require(files, layer, group, {fields[marker]: marker})
    return layers


def require(files: TensorFile, layer: str, keys: Mapping[str, str], needed: Mapping[str, str]) -> None:
    """Raise a ValueError that names the first tensor a layer lacks. `needed`: field -> its name in the file."""
    for field, tail in needed.items():
        if field not in keys:
            raise ValueError(
                f"{files.path.name}: {layer}.{tail}: expected this tensor beside "
                f"{', '.join(sorted(keys.values()))}, got none. The file is incomplete; download it again."
            )


def forbid(files: TensorFile, keys: Mapping[str, str], unwanted: tuple[str, ...], why: str) -> None:
    """Raise a ValueError that names the first tensor that contradicts the layer's format."""
    for field in unwanted:
        if field in keys:
            raise ValueError(
                f"{files.path.name}: {keys[field]}: expected no such tensor{why}, got one. "
                "The file mixes two formats; convert it again from its source."
            )


def check_tensor(
    files: TensorFile,
    key: str,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    shape: tuple[int, ...] | None = None,
    numel: tuple[int, ...] = (),
    why: str = "",
) -> TensorInfo:
    """Raise a ValueError unless a tensor has one of these dtypes, this shape, one of these element counts."""
    info = files.info[key]
    found = f"{_short(info.dtype)} {list(info.shape)}"
    wanted = " or ".join(_short(dtype) for dtype in dtypes)
    hint = "The file is damaged or not what its names say; download or convert it again."
    if info.dtype not in dtypes:
        raise ValueError(f"{files.path.name}: {key}: expected {wanted}, got {found}. {hint}")
    if shape is not None and info.shape != shape:
        raise ValueError(f"{files.path.name}: {key}: expected shape {list(shape)}{why}, got {found}. {hint}")
    if numel and math.prod(info.shape) not in numel:
        raise ValueError(f"{files.path.name}: {key}: expected {numel[0]} elements{why}, got {found}. {hint}")
    return info


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def json_object(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text is, empty where it is none: what a file says of itself may be anything."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def layer_bytes(files: TensorFile, keys: Mapping[str, str]) -> int:
    """Bytes that a layer's tensors take in the file."""
    return sum(files.info[key].nbytes for key in keys.values())
