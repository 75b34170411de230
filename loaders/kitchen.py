"""The comfy-kitchen dialect: a `comfy_quant` JSON beside every quantized layer, in one of two layouts.

    svdquant_w4a4   natural: weight I8 [N, K/2], weight_scale [K/64, N], smooth_factor [K], proj_down [K, R],
                    proj_up [N, R], bias [N], all row-major
                    kitchen_tile_packed_w4a4: weight, weight_scale and proj_up in tiles of 128 rows
    awq_w4a16       weight I8 [N, K/2], weight_scale and weight_zero [K/64, N]; W = (code - 8) * scale + zero

There is no NVFP4 SVDQuant here. `act_unsigned` marks layers whose activations are shifted by 0.171875. We write
the natural layout, with weight_zero in fp32, where the sum zeros + 8 * scales is exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..svdquant.core import tiles
from ..svdquant.core.weights import GELU_SHIFT, LinearWeights, QuantSpec
from .checkpoint import Checkpoint, LayerInfo, assemble, check_tensor, group_keys, layer_bytes, require
from .tensorfile import TensorFile
from .writer import Progress, write_checkpoint

SVDQUANT, AWQ = "svdquant_w4a4", "awq_w4a16"
TILE_PACKED = "kitchen_tile_packed_w4a4"
GROUP = 64
AWQ_OFFSET = 8  # kitchen centres unsigned codes on 8

FIELDS = {
    "comfy_quant": "comfy_quant",
    "weight": "codes",
    "weight_scale": "scales",
    "weight_zero": "zeros",
    "weight_zeros": "zeros",
    "smooth_factor": "smooth",
    "weight_smooth_factor": "smooth",
    "proj_down": "down",
    "weight_proj_down": "down",
    "proj_up": "up",
    "weight_proj_up": "up",
    "bias": "bias",
}
_HINT = "The file is damaged; download or convert it again."


def detect(files: TensorFile) -> bool:
    """Whether any `X.comfy_quant` names one of the two formats."""
    keys = (name for name in files if name.endswith(".comfy_quant"))
    return any(layer_settings(files, key).get("format") in (SVDQUANT, AWQ) for key in keys)


def layer_settings(files: TensorFile, key: str) -> dict[str, Any]:
    """The JSON object in a `comfy_quant` tensor."""
    check_tensor(files, key, dtypes=(torch.uint8,))
    raw = files[key].numpy().tobytes()
    try:
        settings = json.loads(raw)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{files.path.name}: {key}: expected a JSON object, the layer's format, got {raw[:40]!r}. {_HINT}"
        )
    return settings


def read(files: TensorFile) -> Checkpoint:
    """Describe every layer from its JSON and the header; layers of other comfy_quant formats stay plain."""
    info: dict[str, LayerInfo] = {}
    foreign: list[str] = []
    for layer, keys in group_keys(files, FIELDS, "comfy_quant").items():
        settings = layer_settings(files, keys["comfy_quant"])
        if settings.get("format") == AWQ:
            info[layer] = _describe_awq(files, layer, keys, settings)
        elif settings.get("format") == SVDQUANT:
            info[layer] = _describe_svdquant(files, layer, keys, settings)
        else:
            foreign.append(f"{layer}: format {settings.get('format')} is not read here")
    warnings = [f"{foreign[0]}; {len(foreign)} layers stay plain tensors."] if foreign else []
    return assemble(files, "kitchen", info, _decode, warnings=warnings)


def _describe_svdquant(
    files: TensorFile, layer: str, keys: Mapping[str, str], settings: Mapping[str, Any]
) -> LayerInfo:
    needed = {"codes": "weight", "scales": "weight_scale", "smooth": "smooth_factor"}
    require(files, layer, keys, {**needed, "down": "proj_down", "up": "proj_up"})
    _check_settings(files, keys["comfy_quant"], settings)
    packed = settings.get("layout") == TILE_PACKED
    n, k = _size(files, keys["codes"], packed)
    rank = (*files.info[keys["down"]].shape, 0, 0)[1]
    groups = k // GROUP
    check_tensor(files, keys["scales"], shape=(n // 128, groups, 128) if packed else (groups, n))
    check_tensor(files, keys["smooth"], shape=(k,))
    check_tensor(files, keys["down"], shape=(k, rank), why=" (in_features, rank)")
    check_tensor(files, keys["up"], shape=(n // 128, rank, 128) if packed else (n, rank))
    if "bias" in keys:
        check_tensor(files, keys["bias"], shape=(n,))
    spec = QuantSpec("int4", GROUP, GELU_SHIFT if settings.get("act_unsigned") else 0.0)
    return LayerInfo(spec, n, k, rank, layer_bytes(files, keys), keys)


def _check_settings(files: TensorFile, key: str, settings: Mapping[str, Any]) -> None:
    """The settings that change what the numbers mean must have the values we know."""
    known = {
        "layout": (None, "natural", TILE_PACKED),
        "lowrank_branch_input_basis": (None, "raw"),
        "proj_down_smooth_folded": (None, True),
        "group_size": (None, GROUP),
    }
    for setting, values in known.items():
        if settings.get(setting) not in values:
            raise ValueError(
                f"{files.path.name}: {key}: expected {setting} to be {values[-1]!r}, "
                f"got {settings[setting]!r}. The file was made by a newer tool than this pack."
            )


def _size(files: TensorFile, key: str, packed: bool) -> tuple[int, int]:
    """(N, K) of a natural or tile-packed weight."""
    shape = check_tensor(files, key, dtypes=(torch.int8, torch.uint8)).shape
    if packed and len(shape) == 4 and shape[2:] == (32, 128) and all(shape):
        return shape[0] * 128, shape[1] * 64
    if not packed and len(shape) == 2 and shape[1] * 2 % GROUP == 0 and all(shape):
        return shape[0], shape[1] * 2
    wanted = "[N/128, K/64, 32, 128]" if packed else f"[N, K/2] with K in multiples of {GROUP}"
    raise ValueError(f"{files.path.name}: {key}: expected {wanted}, got {list(shape)}. {_HINT}")


def _describe_awq(
    files: TensorFile, layer: str, keys: Mapping[str, str], settings: Mapping[str, Any]
) -> LayerInfo:
    require(files, layer, keys, {"codes": "weight", "scales": "weight_scale", "zeros": "weight_zero"})
    n, k = _size(files, keys["codes"], packed=False)
    group = settings.get("group_size", GROUP)
    if type(group) is not int or group <= 0 or group % 16 or k % group:
        raise ValueError(
            f"{files.path.name}: {keys['comfy_quant']}: expected a group_size that divides {k}, "
            f"got {group!r}. {_HINT}"
        )
    check_tensor(files, keys["scales"], shape=(k // group, n))
    check_tensor(files, keys["zeros"], shape=(k // group, n))
    if "bias" in keys:
        check_tensor(files, keys["bias"], shape=(n,))
    return LayerInfo(QuantSpec("awq", group), n, k, 0, layer_bytes(files, keys), keys)


def _decode(t: Mapping[str, Tensor], info: LayerInfo) -> LinearWeights:
    codes = t["codes"].view(torch.uint8)
    if info.spec.format == "awq":
        scales = t["scales"].T.contiguous()
        return LinearWeights(info.spec, codes, scales, zeros=_zeros(t["zeros"].T, scales), bias=t.get("bias"))
    packed = codes.ndim == 4
    return LinearWeights(
        info.spec,
        tiles.untile_kitchen_codes(codes) if packed else codes,
        tiles.untile_kitchen_rows(t["scales"]) if packed else t["scales"].T.contiguous(),
        smooth=t["smooth"],
        down=t["down"].T.contiguous(),
        up=tiles.untile_kitchen_rows(t["up"]) if packed else t["up"],
        bias=t.get("bias"),
    )


def _zeros(weight_zero: Tensor, scales: Tensor) -> Tensor:
    """weight_zero - 8 * scales, in the scales' dtype where it holds the number exactly, else in fp32."""
    zeros = weight_zero.float() - AWQ_OFFSET * scales.float()
    narrow = zeros.to(scales.dtype)
    return narrow if torch.equal(narrow.float(), zeros) else zeros.contiguous()


def encode_linear(weights: LinearWeights) -> dict[str, Tensor]:
    """One linear in natural layout, by the last part of the tensors' names. ValueError for NVFP4."""
    w = weights
    if w.spec.format == "nvfp4":
        raise ValueError("kitchen has no NVFP4 SVDQuant layer. Convert to nunchaku or natural instead.")
    tensors = {"weight": w.codes.view(torch.int8), "weight_scale": w.scales.T.contiguous()}
    if w.spec.format == "awq":
        zero = w.zeros.float() + AWQ_OFFSET * w.scales.float()
        tensors["weight_zero"] = zero.T.contiguous()
    else:
        tensors |= {"smooth_factor": w.smooth, "proj_down": w.down.T.contiguous(), "proj_up": w.up}
    if w.bias is not None:
        tensors["bias"] = w.bias
    return {**tensors, "comfy_quant": settings_tensor(w.spec)}


def settings_tensor(spec: QuantSpec) -> Tensor:
    """The `comfy_quant` bytes of a layer: compact JSON with sorted keys."""
    if spec.format == "awq":
        settings: dict[str, Any] = {"format": AWQ, "group_size": spec.group}
    else:
        settings = {"format": SVDQUANT, "lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True}
    if spec.act_shift:
        if spec.act_shift != GELU_SHIFT:
            raise ValueError(
                f"kitchen knows the activation shift {GELU_SHIFT} only, got {spec.act_shift}. "
                "Convert to natural instead."
            )
        settings["act_unsigned"] = True
    text = json.dumps(settings, separators=(",", ":"), sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def write(
    path: Path,
    layers: Mapping[str, LinearWeights],
    plain: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    progress: Progress | None = None,
) -> None:
    """Write a kitchen file in natural layout; arguments as in writer.write_checkpoint."""
    write_checkpoint(path, layers, plain, metadata, encode_linear, progress=progress)
