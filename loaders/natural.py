"""The natural dialect: row-major, nothing to know. For models without a layout of their own, and for checking.

X.codes         [N, K]   int8 (INT4, -8..7) | uint8 (NVFP4: e2m1 codes 0..15; AWQ: 0..15), or in half the space
X.nibbles       [N, K/2] uint8, two codes a byte, even column in the low half (INT4: two's complement)
X.scales        [N, G]   as stored elsewhere: 16-bit, e4m3 for NVFP4
X.second_scale  [1]|[N]  NVFP4
X.zeros         [N, G]   AWQ
X.smooth [K]  X.down [R, K]  X.up [N, R]     W4A4
X.bias          [N]      where the layer has one
X.act_shift     [1]      F32, where activations are shifted and their codes unsigned
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..svdquant.core.int4 import (
    STORED_MAX,
    STORED_MIN,
    UNSIGNED_MAX,
    pack_nibbles,
    unpack_signed,
    unpack_unsigned,
)
from ..svdquant.core.weights import LinearWeights, QuantSpec
from .checkpoint import (
    FLOATS,
    Checkpoint,
    LayerInfo,
    assemble,
    check_tensor,
    forbid,
    group_keys,
    layer_bytes,
    require,
)
from .tensorfile import TensorFile
from .writer import Progress, write_checkpoint

_TAILS = ("codes", "scales", "second_scale", "zeros", "smooth", "down", "up", "bias", "act_shift")
FIELDS = {tail: tail for tail in _TAILS} | {"nibbles": "codes"}
_W4A4 = ("smooth", "down", "up")
_NEEDED = {"int4": _W4A4, "nvfp4": (*_W4A4, "second_scale"), "awq": ("zeros",)}
_UNWANTED = {"int4": ("zeros", "second_scale"), "nvfp4": ("zeros", "act_shift"), "awq": (*_W4A4, "act_shift")}
_HINT = "The file is damaged; convert it again."


def detect(files: TensorFile) -> bool:
    """Whether any layer has `X.codes` or `X.nibbles` beside `X.scales`."""
    layers = (name.rpartition(".")[0] for name in files if name.endswith((".codes", ".nibbles")))
    return any(f"{layer}.scales" in files for layer in layers)


def read(files: TensorFile) -> Checkpoint:
    """Describe every quantized layer; decode none."""
    layers = group_keys(files, FIELDS, "codes")
    info = {layer: describe(files, layer, keys) for layer, keys in layers.items()}
    return assemble(files, "natural", info, _decode)


def describe(files: TensorFile, layer: str, keys: Mapping[str, str]) -> LayerInfo:
    """A layer's LayerInfo from the header. ValueError for a missing tensor, a wrong dtype or a wrong size."""
    require(files, layer, keys, {"scales": "scales"})
    shape = check_tensor(files, keys["codes"], dtypes=(torch.int8, torch.uint8)).shape
    scales = check_tensor(files, keys["scales"], dtypes=(*FLOATS, torch.float8_e4m3fn))
    n, k = shape if len(shape) == 2 else (0, 0)
    k *= 2 if _packed(keys) else 1
    groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] == n else 0
    if not n or not k or not groups or k % groups or (k // groups) % 16:
        raise ValueError(
            f"{files.path.name}: {keys['scales']}: expected one row of group scales for each row of codes "
            f"{list(shape)}, got {list(scales.shape)}. {_HINT}"
        )
    scheme = _format(files, keys)
    require(files, layer, keys, {field: field for field in _NEEDED[scheme]})
    forbid(files, keys, _UNWANTED[scheme], f" in an {scheme} layer")
    rank = _check_others(files, keys, n, k, groups)
    spec = QuantSpec(scheme, k // groups, _act_shift(files, keys))
    return LayerInfo(spec, n, k, rank, layer_bytes(files, keys), keys)


def _packed(keys: Mapping[str, str]) -> bool:
    return keys["codes"].endswith(".nibbles")


def _format(files: TensorFile, keys: Mapping[str, str]) -> str:
    if files.info[keys["scales"]].dtype == torch.float8_e4m3fn:
        return "nvfp4"
    if _packed(keys):
        return "awq" if "zeros" in keys else "int4"
    return "int4" if files.info[keys["codes"]].dtype == torch.int8 else "awq"


def _check_others(files: TensorFile, keys: Mapping[str, str], n: int, k: int, groups: int) -> int:
    """Check the tensors around codes and scales; returns the rank."""
    rank = files.info[keys["down"]].shape[0] if "down" in keys and files.info[keys["down"]].shape else 0
    shapes = {"zeros": (n, groups), "smooth": (k,), "down": (rank, k), "up": (n, rank), "bias": (n,)}
    for field in shapes.keys() & keys.keys():
        check_tensor(files, keys[field], shape=shapes[field])
    for field, counts in (("second_scale", (n, 1)), ("act_shift", (1,))):
        if field in keys:
            check_tensor(files, keys[field], numel=counts)
    return rank


def _act_shift(files: TensorFile, keys: Mapping[str, str]) -> float:
    shift = float(files[keys["act_shift"]].flatten()[0]) if "act_shift" in keys else 0.0
    if not 0 <= shift < math.inf:
        raise ValueError(
            f"{files.path.name}: {keys['act_shift']}: expected a finite number from 0 on, got {shift}. {_HINT}"
        )
    return shift


def _decode(t: Mapping[str, Tensor], info: LayerInfo) -> LinearWeights:
    if _packed(info.keys):
        return LinearWeights(info.spec, **t)
    low, high = (STORED_MIN, STORED_MAX) if info.spec.format == "int4" else (0, UNSIGNED_MAX)
    smallest, largest = (int(v) for v in t["codes"].aminmax())
    if smallest < low or largest > high:
        raise ValueError(f"codes: expected {low}..{high}, got {smallest}..{largest}. {_HINT}")
    fields = {field: tensor for field, tensor in t.items() if field != "codes"}
    return LinearWeights(info.spec, pack_nibbles(t["codes"]), **fields)


def encode_linear(weights: LinearWeights, *, packed: bool = False) -> dict[str, Tensor]:
    """One linear by the last part of the tensors' names; packed: two codes a byte."""
    tensors = weights.tensors()
    codes = tensors.pop("codes")
    unpack = unpack_signed if weights.spec.format == "int4" else unpack_unsigned
    tensors = {"nibbles": codes} | tensors if packed else {"codes": unpack(codes)} | tensors
    if weights.spec.act_shift:
        tensors["act_shift"] = torch.tensor([weights.spec.act_shift], dtype=torch.float32)
    return tensors


def write(
    path: Path,
    layers: Mapping[str, LinearWeights],
    plain: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    packed: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a natural file, one code a byte or two; other arguments as in writer.write_checkpoint."""
    encode = partial(encode_linear, packed=packed)
    write_checkpoint(path, layers, plain, metadata, encode, progress=progress)
