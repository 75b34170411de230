"""csrc/launch.h for ctypes: what a kernel is given. Tests hold every size and offset against the C++.

Letters: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

import ctypes

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
KINDS = {"int4": 0, "int4-unsigned": 1, "nvfp4": 2, "int8": 3, "e4m3": 4}  # e4m3: either int4

_SIZE, _POINTER, _ENUM = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _aligned(name: str, multiple: int, **fields: type) -> type[ctypes.Structure]:
    """Filled up to a multiple of bytes, as C++ does for what has such a member, and as a launch reads it."""
    gap = -ctypes.sizeof(_struct(name, **fields)) % multiple
    return _struct(name, **fields, **({"_gap": ctypes.c_uint8 * gap} if gap else {}))


Floats = _struct("Floats", data=_POINTER, dtype=_ENUM, stride=_SIZE)
Output = _struct("Output", data=_POINTER, dtype=_ENUM, stride=_SIZE)
Quantize = _struct(
    "Quantize",
    kind=_ENUM,
    **dict.fromkeys("mkr", _SIZE),
    **dict.fromkeys(("x", "smooth", "down"), Floats),
    shift=ctypes.c_float,
    **dict.fromkeys(("codes", "scales", "hidden"), _POINTER),
    scale_row=_SIZE,
)
QuantizeParams = _struct(  # of csrc/cuda/quantize.cuh
    "QuantizeParams", args=Quantize, **dict.fromkeys(("inverse", "low", "high"), ctypes.c_float)
)
Gemm = _struct(
    "Gemm",
    kind=_ENUM,
    **dict.fromkeys("mnkr", _SIZE),
    codes=_POINTER,
    scales=Floats,
    **dict.fromkeys(("hidden", "weight_codes"), _POINTER),
    **dict.fromkeys(("weight_scales", "second_scale", "up", "bias", "addend"), Floats),
    out=Output,
)
GemmGelu = _struct("GemmGelu", product=Gemm, next=Quantize)
GeluParams = _struct(  # of csrc/cuda/gemm_gelu.cuh
    "GeluParams", product=Gemm, next=QuantizeParams, parts=_POINTER, walk=ctypes.c_int32
)
PartsParams = _struct("PartsParams", parts=_POINTER, sums=_POINTER, count=_SIZE, size=_SIZE)
GemmInt8 = _struct(
    "GemmInt8",
    **dict.fromkeys("mnkr", _SIZE),
    **dict.fromkeys(("codes", "scales", "hidden", "weight_codes", "weight_scales"), _POINTER),
    **dict.fromkeys(("up", "bias", "addend"), Floats),
    out=Output,
)
Gemv = _struct(
    "Gemv",
    **dict.fromkeys(("m", "n", "k", "group"), _SIZE),
    x=Floats,
    weight_codes=_POINTER,
    **dict.fromkeys(("weight_scales", "zeros", "bias", "addend"), Floats),
    out=Output,
)

# ---- of csrc/cuda/hopper_*.cuh ----

_INT = ctypes.c_int32
MAP_ALIGNMENT = 128
TensorMap = _struct("TensorMap", words=ctypes.c_uint64 * 16)  # the driver's own, which it alone can fill in
TileGrid = _struct("TileGrid", rows=_INT, columns=_INT, workers=_INT, band=_INT)
Finish = _struct(
    "Finish",
    **dict.fromkeys("mnr", _INT),
    **dict.fromkeys(("scales", "weight_scales", "hidden"), _POINTER),
    **dict.fromkeys(("up", "bias", "addend"), Floats),
    out=Output,
)
W8A8Params = _aligned(
    "W8A8Params",
    MAP_ALIGNMENT,
    **dict.fromkeys(("codes", "weights"), TensorMap),
    grid=TileGrid,
    steps=_INT,
    finish=Finish,
)
W4A4Params = _aligned(
    "W4A4Params",
    MAP_ALIGNMENT,
    **dict.fromkeys(("codes", "weights", "scales", "weight_scales"), TensorMap),
    grid=TileGrid,
    steps=_INT,
    finish=Finish,
)
Expand = _struct(
    "Expand",
    codes=_POINTER,
    scales=Floats,
    n=_SIZE,
    k=_SIZE,
    to_codes=_POINTER,
    to_scales=_POINTER,
    scale_row=_SIZE,
    blocks=_INT,
)
LaunchConfig = _struct(  # CUlaunchConfig of cuda.h
    "LaunchConfig",
    **{f"{of}_{axis}": ctypes.c_uint32 for of in ("grid", "block") for axis in "xyz"},
    shared_bytes=ctypes.c_uint32,
    stream=_POINTER,
    attributes=_POINTER,
    attribute_count=ctypes.c_uint32,
)
