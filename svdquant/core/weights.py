"""What a quantized linear is, on every device and from every file: `QuantSpec` and `LinearWeights`.

The form is natural: row-major, channels in the model's own order, padding cropped. Readers decode to it, writers
and device backends encode from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORMATS = ("int4", "nvfp4", "awq")
GELU_SHIFT = 0.171875  # 11/64, above -min(gelu); exact in bf16 and fp16


@dataclass(frozen=True)
class QuantSpec:
    """How a linear was quantized.

    format     "int4" (W4A4, signed codes) | "nvfp4" (W4A4, e2m1) | "awq" (W4A16, unsigned codes and zeros)
    group      columns that share a scale
    act_shift  added to activations before smoothing; > 0 means their codes are unsigned 0..15 (int4 only)
    """

    format: str
    group: int
    act_shift: float = 0.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"quantization format: expected one of {FORMATS}, got {self.format!r}.")
        if self.group <= 0 or self.group % 16:
            raise ValueError(f"group size: expected a positive multiple of 16, got {self.group}.")
        if self.act_shift and self.format != "int4":
            raise ValueError(
                f"act_shift: only int4 activations are unsigned, got {self.format} with {self.act_shift}."
            )


INT4 = QuantSpec("int4", 64)
INT4_UNSIGNED = QuantSpec("int4", 64, GELU_SHIFT)
NVFP4 = QuantSpec("nvfp4", 16)
AWQ = QuantSpec("awq", 64)


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """One quantized linear in natural form, checked on creation.

    codes         [N, K/2]     uint8       two codes a byte, even column in the low half
    scales        [N, K/group] T | e4m3    e4m3 for nvfp4
    second_scale  [1] | [N]    any float   nvfp4: multiplies every scale of the tensor or row; else None
    zeros         [N, K/group] T           awq: added to code * scale; else None
    smooth        [K]          T           divides activations; None for awq
    down          [R, K]       T           low-rank branch on raw activations, R may be 0; None for awq
    up            [N, R]       T
    bias          [N]          T           None where the layer has none. For act_shift > 0 it carries
                                           -(W - up @ down) @ shift already, as files store it.

    Raises ValueError that names the field, the shape expected and the shape found.
    """

    spec: QuantSpec
    codes: Tensor
    scales: Tensor
    second_scale: Tensor | None = None
    zeros: Tensor | None = None
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        check_linear(self)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * 2

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name, in the order of the fields."""
        values = {name: getattr(self, name) for name in TENSOR_FIELDS}
        return {name: t for name, t in values.items() if t is not None}

    def rows(self, index: slice | Tensor) -> LinearWeights:
        """The same linear with some output rows, in the order of `index`."""
        per_row = {name: t[index] for name, t in self.tensors().items() if name in _BY_ROW}
        if self.second_scale is not None and self.second_scale.numel() > 1:
            per_row["second_scale"] = self.second_scale[index]
        return replace(self, **per_row)

    def crop(self, out_features: int, in_features: int) -> LinearWeights:
        """Drop padding rows and columns: the first `out_features` x `in_features` of a padded layer."""
        n, k, g = out_features, in_features, self.spec.group
        if n > self.out_features or k > self.in_features or k % g:
            raise ValueError(
                f"crop: a [{self.out_features}, {self.in_features}] layer of group {g} cannot become [{n}, {k}]."
            )
        top = self.rows(slice(0, n))
        cut = {"codes": top.codes[:, : k // 2], "scales": top.scales[:, : k // g]}
        if top.zeros is not None:
            cut["zeros"] = top.zeros[:, : k // g]
        if top.smooth is not None:
            cut |= {"smooth": top.smooth[:k], "down": top.down[:, :k]}
        return replace(top, **cut)


TENSOR_FIELDS = ("codes", "scales", "second_scale", "zeros", "smooth", "down", "up", "bias")
_BY_ROW = ("codes", "scales", "zeros", "up", "bias")


def expected_shapes(w: LinearWeights) -> dict[str, tuple[int, ...]]:
    """The shape every tensor of a linear must have, from its codes, rank and group."""
    n, k = w.codes.shape[0], w.codes.shape[1] * 2
    groups = (n, k // w.spec.group)
    second = (1,) if w.second_scale is None or w.second_scale.numel() == 1 else (n,)
    return {
        "scales": groups,
        "second_scale": second,
        "zeros": groups,
        "smooth": (k,),
        "down": (w.rank, k),
        "up": (n, w.rank),
        "bias": (n,),
    }


_NEEDED = {
    "int4": {"scales", "smooth", "down", "up"},
    "nvfp4": {"scales", "second_scale", "smooth", "down", "up"},
    "awq": {"scales", "zeros"},
}


def check_linear(w: LinearWeights) -> None:
    """Raise a ValueError that names the first field whose presence, dtype or shape is wrong."""
    if w.codes.dtype != torch.uint8 or w.codes.ndim != 2:
        raise ValueError(f"codes: expected packed uint8 [N, K/2], got {w.codes.dtype} {list(w.codes.shape)}.")
    if w.in_features % w.spec.group:
        raise ValueError(f"codes: K = {w.in_features} is not a multiple of the group {w.spec.group}.")
    present = set(w.tensors()) - {"codes", "bias"}
    if present != _NEEDED[w.spec.format]:
        wrong = sorted(present ^ _NEEDED[w.spec.format])
        raise ValueError(f"{w.spec.format} linear: {', '.join(wrong)} missing or out of place.")
    expected = expected_shapes(w)
    for name, tensor in w.tensors().items():
        if name != "codes" and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: expected shape {list(expected[name])}, got {list(tensor.shape)}.")
    if (w.scales.dtype == torch.float8_e4m3fn) != (w.spec.format == "nvfp4"):
        raise ValueError(
            f"scales: {w.spec.format} expects {'e4m3' if w.spec.format == 'nvfp4' else 'a 16-bit float'}"
            f", got {w.scales.dtype}."
        )
