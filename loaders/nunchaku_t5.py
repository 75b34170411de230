"""The Nunchaku dialect of T5 text encoders: AWQ W4A16 linears under Hugging Face names, everything else in 16 bits.

    qweight       I16 (N/4, K)     codes in order P7, the bytes of the I32 form of modulation layers
    scales        T   (rows, N)    plain; rows = groups along K, and zeros up to a multiple of 8, 16 or 32
    scaled_zeros  T   (rows, N)    added to code * scale
    bias          T   (N)          T5 has none

The group, 128 in the published file, follows from the number of rows. Norms belong to the file, as AWQ may have
folded scales into them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..svdquant.core import tiles
from ..svdquant.core.weights import LinearWeights, QuantSpec
from .checkpoint import Checkpoint, LayerInfo, assemble, check_tensor, group_keys, layer_bytes, require
from .tensorfile import TensorFile

DIALECT = "nunchaku_t5"
FIELDS = {"qweight": "codes", "scales": "scales", "scaled_zeros": "zeros", "bias": "bias"}
GROUPS = (128, 64, 32)
_HINT = "The file is damaged or another dialect."


def detect(files: TensorFile) -> bool:
    """Whether any `X.qweight` is I16."""
    return any(name.endswith(".qweight") and files.info[name].dtype == torch.int16 for name in files)


def read(files: TensorFile) -> Checkpoint:
    """Describe every quantized layer; decode none."""
    layers = group_keys(files, FIELDS, "qweight")
    info = {layer: describe(files, layer, keys) for layer, keys in layers.items()}
    return assemble(files, DIALECT, info, decode)


def describe(files: TensorFile, layer: str, keys: Mapping[str, str]) -> LayerInfo:
    """A layer's LayerInfo from the header. ValueError for a missing tensor, a wrong dtype or a wrong size."""
    require(files, layer, keys, {"scales": "scales", "zeros": "scaled_zeros"})
    codes = check_tensor(files, keys["codes"], dtypes=(torch.int16,)).shape
    if len(codes) != 2 or not codes[0] or not codes[1] or codes[1] % 64:
        raise ValueError(
            f"{files.path.name}: {keys['codes']}: expected (N/4, K) with K in multiples of 64, "
            f"got {list(codes)}. {_HINT}"
        )
    n, k = codes[0] * 4, codes[1]
    rows = (*check_tensor(files, keys["scales"]).shape, 0)[0]
    try:
        spec = QuantSpec("awq", group_of(k, rows))
    except ValueError as error:
        raise ValueError(f"{files.path.name}: {keys['scales']}: {error}") from None
    for field in ("scales", "zeros"):
        check_tensor(files, keys[field], shape=(rows, n))
    if "bias" in keys:
        check_tensor(files, keys["bias"], shape=(n,))
    return LayerInfo(spec, n, k, 0, layer_bytes(files, keys), keys)


def group_of(k: int, rows: int) -> int:
    """The group size that gives K columns this many rows of scales. ValueError where none does."""
    for group in GROUPS:
        if k % group == 0 and scale_rows(k, group) == rows:
            return group
    raise ValueError(f"expected scale rows for groups of {GROUPS} along K = {k}, got {rows}. {_HINT}")


def scale_rows(k: int, group: int) -> int:
    """Allocated rows of scales: a multiple of 8, 16 or 32 for groups of 128, 64, 32."""
    multiple = 8 * 128 // group
    return -(-k // group // multiple) * multiple


def decode(tensors: Mapping[str, Tensor], info: LayerInfo) -> LinearWeights:
    """One linear from its stored tensors by field."""
    groups = info.in_features // info.spec.group
    scales, zeros = (tensors[field][:groups].T.contiguous() for field in ("scales", "zeros"))
    codes = tiles.untile_awq_codes(tensors["codes"])
    return LinearWeights(info.spec, codes, scales, zeros=zeros, bias=tensors.get("bias"))


def encode_linear(w: LinearWeights) -> dict[str, Tensor]:
    """One linear as stored tensors, by the last part of their names; scale rows padded with zeros.

    Raises ValueError for rows that are no multiple of 4, which the order of codes cannot hold.
    """
    if w.out_features % 4:
        raise ValueError(f"AWQ codes: expected rows in multiples of 4, got {w.out_features}. Pad the layer.")
    extra = scale_rows(w.in_features, w.spec.group) - w.scales.shape[1]
    return {
        "qweight": tiles.tile_awq_codes(w.codes),
        "scales": pad(w.scales.T, (0, 0, 0, extra)).contiguous(),
        "scaled_zeros": pad(w.zeros.T.to(w.scales.dtype), (0, 0, 0, extra)).contiguous(),
        **({} if w.bias is None else {"bias": w.bias}),
    }
