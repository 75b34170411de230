"""One linear in the Nunchaku dialect: tensor-core fragment order, padded to 128 rows and columns.

    qweight I8  + wscales T      W4A4 INT4, group 64      orders P1 P3
    qweight I8  + wscales e4m3   W4A4 NVFP4, group 16     orders P1 P4; with wtscale [1] or wcscales [N] (P2)
    qweight I32 + wzeros         AWQ W4A16, group 64      order P7, scales plain [G, N]

Stored shapes of W4A4 tensors are nominal; svdquant.core.tiles knows the order inside. The branch and the
smoothing vector have two sets of names, V1 and V2, for the same bytes. Text encoders are in nunchaku_t5.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..svdquant.core import tiles
from ..svdquant.core.weights import AWQ, INT4, NVFP4, LinearWeights, QuantSpec
from . import nunchaku_t5
from .checkpoint import FLOATS, LayerInfo, check_tensor, forbid, layer_bytes, require
from .tensorfile import TensorFile, TensorInfo


@dataclass(frozen=True)
class Names:
    """How a file calls the branch and the smoothing vectors."""

    down: str
    up: str
    smooth: str
    smooth_orig: str


V1 = Names("lora_down", "lora_up", "smooth", "smooth_orig")
V2 = Names("proj_down", "proj_up", "smooth_factor", "smooth_factor_orig")

FIELDS = {
    "qweight": "codes",
    "wscales": "scales",
    "wzeros": "zeros",
    "wtscale": "second_scale",
    "wcscales": "row_scale",
    "bias": "bias",
    **{
        getattr(names, field): field
        for names in (V1, V2)
        for field in ("down", "up", "smooth", "smooth_orig")
    },
}


def spec_of(fields: Mapping[str, Tensor | TensorInfo]) -> QuantSpec:
    """The format a linear's tensors say they are in, by their dtypes."""
    if fields["codes"].dtype == torch.int32:
        return AWQ
    return NVFP4 if fields["scales"].dtype == torch.float8_e4m3fn else INT4


def describe(files: TensorFile, layer: str, keys: Mapping[str, str]) -> LayerInfo:
    """A layer's LayerInfo from the header. ValueError for a missing tensor, a wrong dtype or a wrong size."""
    codes = check_tensor(files, keys["codes"], dtypes=(torch.int8, torch.int32))
    if len(codes.shape) != 2:
        raise ValueError(
            f"{files.path.name}: {keys['codes']}: expected two axes, got {list(codes.shape)}. "
            "The file is damaged or another dialect."
        )
    if codes.dtype == torch.int8:
        return _describe_w4a4(files, layer, keys)
    return _describe_awq(files, layer, keys)


def _describe_w4a4(files: TensorFile, layer: str, keys: Mapping[str, str]) -> LayerInfo:
    require(files, layer, keys, {"scales": "wscales", "smooth": "smooth (or .smooth_factor)"})
    n, k = files.info[keys["codes"]].shape[0], files.info[keys["codes"]].shape[1] * 2
    if n % tiles.TILE_N or k % tiles.TILE_N or not n or not k:
        raise ValueError(
            f"{files.path.name}: {keys['codes']}: expected rows and columns padded to {tiles.TILE_N}, "
            f"got {n} x {k}. The file is damaged or another dialect."
        )
    spec = spec_of({field: files.info[key] for field, key in keys.items()})
    scale_dtypes = (*FLOATS, torch.float8_e4m3fn)
    check_tensor(files, keys["scales"], dtypes=scale_dtypes, numel=_scale_counts(n, k, spec), why=_why(spec))
    check_tensor(files, keys["smooth"], numel=(k,))
    for field, count in (("bias", n), ("second_scale", 1), ("row_scale", n)):
        if field in keys:
            check_tensor(files, keys[field], numel=(count,))
    unwanted = ("zeros",) if spec.format == "nvfp4" else ("zeros", "second_scale", "row_scale")
    forbid(files, keys, unwanted, _why(spec))
    return LayerInfo(spec, n, k, _rank(files, layer, keys, n, k), layer_bytes(files, keys), keys)


def _why(spec: QuantSpec) -> str:
    return f" in {spec.format} of group {spec.group}, which the dtype of the scales says"


def _scale_counts(n: int, k: int, spec: QuantSpec) -> tuple[int, ...]:
    """Legal numbers of scales. NVFP4 packers padded K to 128 in the codes but only to 64 in the scales."""
    groups = k // spec.group
    return (n * groups, n * (groups - 4)) if spec.format == "nvfp4" else (n * groups,)


def _rank(files: TensorFile, layer: str, keys: Mapping[str, str], n: int, k: int) -> int:
    if "down" not in keys and "up" not in keys:
        return 0
    require(files, layer, keys, {"down": "lora_down (or .proj_down)", "up": "lora_up (or .proj_up)"})
    rank = (*files.info[keys["down"]].shape, 0, 0)[1]
    check_tensor(files, keys["down"], shape=(k, rank), why=" (in_features, rank)")
    check_tensor(files, keys["up"], shape=(n, rank), why=" (out_features, rank of the down factor)")
    if rank % tiles.TILE_R:
        raise ValueError(
            f"{files.path.name}: {keys['down']}: expected a rank padded to {tiles.TILE_R}, got {rank}. "
            "The file is damaged or another dialect."
        )
    return rank


def _describe_awq(files: TensorFile, layer: str, keys: Mapping[str, str]) -> LayerInfo:
    require(files, layer, keys, {"scales": "wscales", "zeros": "wzeros"})
    n, k = (size * times for size, times in zip(files.info[keys["codes"]].shape, (4, 2), strict=True))
    if k % AWQ.group or not n or not k:
        raise ValueError(
            f"{files.path.name}: {keys['codes']}: expected columns in multiples of {AWQ.group}, got {n} x {k}. "
            "The file is damaged or another dialect."
        )
    for field in ("scales", "zeros"):
        check_tensor(files, keys[field], shape=(k // AWQ.group, n))
    if "bias" in keys:
        check_tensor(files, keys["bias"], shape=(n,))
    forbid(files, keys, ("smooth", "down", "up", "second_scale", "row_scale"), " in a W4A16 layer")
    return LayerInfo(AWQ, n, k, 0, layer_bytes(files, keys), keys)


def decode_linear(tensors: Mapping[str, Tensor]) -> LinearWeights:
    """One linear from its stored tensors, by the last part of their names (V1 or V2), padding kept.

    Raises ValueError when the tensors do not fit each other.
    """
    fields = {FIELDS[tail]: tensor for tail, tensor in tensors.items()}
    return decode_fields(fields, spec_of(fields))


def decode_fields(t: Mapping[str, Tensor], spec: QuantSpec) -> LinearWeights:
    """One linear from its stored tensors, by field."""
    if spec.format == "awq":
        scales, zeros = (t[field].T.contiguous() for field in ("scales", "zeros"))
        return LinearWeights(
            spec, tiles.untile_awq_codes(t["codes"]), scales, zeros=zeros, bias=t.get("bias")
        )
    n, k = t["codes"].shape[0], t["codes"].shape[1] * 2
    smooth = tiles.untile_vector(t["smooth"])
    return LinearWeights(
        spec,
        tiles.untile_codes(t["codes"]),
        _decode_scales(t["scales"], n, k, spec),
        second_scale=_decode_second_scale(t) if spec.format == "nvfp4" else None,
        smooth=smooth,
        down=tiles.untile_down(t["down"]) if "down" in t else smooth.new_zeros(0, k),
        up=tiles.untile_up(t["up"]) if "up" in t else smooth.new_zeros(n, 0),
        bias=tiles.untile_vector(t["bias"]) if "bias" in t else None,
    )


def _decode_scales(stored: Tensor, n: int, k: int, spec: QuantSpec) -> Tensor:
    untile = tiles.untile_micro_scales if spec.format == "nvfp4" else tiles.untile_scales
    return tiles.pad_to(untile(stored.reshape(-1, n)), (1, k // spec.group), 1.0)


def _decode_second_scale(t: Mapping[str, Tensor]) -> Tensor:
    """Per tensor, per row, or both; a missing one is 1, and a product is kept in fp32."""
    tensor_scale = t["second_scale"].reshape(1) if "second_scale" in t else torch.ones(1)
    if "row_scale" not in t:
        return tensor_scale
    row_scale = tiles.untile_vector(t["row_scale"])
    if bool(tensor_scale == 1):
        return row_scale
    if bool((row_scale == 1).all()):
        return tensor_scale
    return row_scale.float() * tensor_scale.float()


def encode_linear(weights: LinearWeights, names: Names = V1, *, zero_bias: bool = True) -> dict[str, Tensor]:
    """One linear as stored tensors, by the last part of their names, padded as the published packers pad.

    zero_bias  whether a layer without bias gets zeros; models built without bias want no key at all
    """
    if weights.spec.format == "awq":
        is_modulation = weights.spec.group == AWQ.group
        return _encode_awq(weights, zero_bias) if is_modulation else nunchaku_t5.encode_linear(weights)
    tensors = {
        "qweight": tiles.tile_codes(tiles.pad_to(weights.codes, (128, 64), 0)),
        **_encode_scales(weights),
        names.smooth: _encode_vector(weights.smooth),
        names.smooth_orig: _encode_vector(weights.smooth),  # which no kernel reads
    }
    if weights.rank:
        tensors[names.down] = tiles.tile_down(tiles.pad_to(weights.down, (16, 128), 0.0))
        tensors[names.up] = tiles.tile_up(tiles.pad_to(weights.up, (128, 16), 0.0))
    bias = _bias(weights, zero_bias)
    return tensors if bias is None else {**tensors, "bias": _encode_vector(bias)}


def _encode_scales(w: LinearWeights) -> dict[str, Tensor]:
    if w.spec.format == "int4":
        return {"wscales": tiles.tile_scales(tiles.pad_to(w.scales, (128, 2), 1.0))}
    scales = tiles.tile_micro_scales(tiles.pad_to(w.scales, (128, 8), 1.0))
    if w.second_scale.numel() == 1:
        return {"wscales": scales, "wtscale": w.second_scale}
    return {"wscales": scales, "wcscales": _encode_vector(w.second_scale.to(w.smooth.dtype))}


def _encode_vector(x: Tensor) -> Tensor:
    return tiles.tile_vector(tiles.pad_to(x, (128,), 1.0))


def _bias(w: LinearWeights, zero_bias: bool) -> Tensor | None:
    if w.bias is None and zero_bias:
        like = w.scales if w.smooth is None else w.smooth
        return like.new_zeros(w.out_features)
    return w.bias


def _encode_awq(w: LinearWeights, zero_bias: bool) -> dict[str, Tensor]:
    if w.out_features % 4:
        raise ValueError(f"AWQ codes: expected rows in multiples of 4, got {w.out_features}. Pad the layer.")
    bias = _bias(w, zero_bias)
    return {
        "qweight": tiles.tile_awq_codes(w.codes).view(torch.int32),
        "wscales": w.scales.T.contiguous(),
        "wzeros": w.zeros.T.to(w.scales.dtype).contiguous(),
        **({} if bias is None else {"bias": bias}),
    }
