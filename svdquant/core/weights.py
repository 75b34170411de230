"""What a quantized linear is, on every device and from every file: `QuantSpec` and `LinearWeights`.

The form is natural: row-major, channels in the model's own order, padding cropped. Readers decode to it, writers
and device backends encode from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORMATS = ("int4", "nvfp4", "awq", "int8")
GELU_SHIFT = 0.171875  # 11/64, above -min(gelu); exact in bf16 and fp16


@dataclass(frozen=True)
class QuantSpec:
    """How a linear was quantized.

    format     "int4" (W4A4, signed codes) | "nvfp4" (W4A4, e2m1) | "awq" (W4A16, unsigned codes and zeros)
               | "int8" (W8A8, what int8.requantize makes of the first two; in no file)
    group      columns that share a scale; None for int8, where a whole row does
    act_shift  added to activations before smoothing; > 0 means that int4 codes are unsigned 0..15
    """

    format: str
    group: int | None
    act_shift: float = 0.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"quantization format: expected one of {FORMATS}, got {self.format!r}.")
        if self.format == "int8" and self.group is not None:
            raise ValueError(
                f"group size: expected None for int8, whose scales are a row's, got {self.group}."
            )
        if self.format != "int8" and (not self.group or self.group < 0 or self.group % 16):
            raise ValueError(f"group size: expected a positive multiple of 16, got {self.group}.")
        if self.act_shift and self.format not in ("int4", "int8"):
            raise ValueError(
                f"act_shift: only integer activations are shifted, got {self.format} with {self.act_shift}."
            )

    @property
    def codes_a_byte(self) -> int:
        return 1 if self.format == "int8" else 2

    def groups(self, in_features: int) -> int:
        """Scales a row: K / group, or one."""
        return in_features // self.group if self.group else 1


INT4 = QuantSpec("int4", 64)
INT4_UNSIGNED = QuantSpec("int4", 64, GELU_SHIFT)
NVFP4 = QuantSpec("nvfp4", 16)
AWQ = QuantSpec("awq", 64)
INT8 = QuantSpec("int8", None)


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """One quantized linear in natural form, checked on creation.

    codes         [N, K/2]     uint8       two codes a byte, even column in the low half
                  [N, K]       int8        int8: one code a byte
    scales        [N, K/group] T | e4m3    e4m3 for nvfp4
                  [N, 1]       fp32        int8
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
        return self.codes.shape[1] * self.spec.codes_a_byte

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
        if n > self.out_features or k > self.in_features or k % (g or 1):
            raise ValueError(
                f"crop: a [{self.out_features}, {self.in_features}] layer of group {g} cannot become [{n}, {k}]."
            )
        top, groups = self.rows(slice(0, n)), self.spec.groups(k)
        cut = {"codes": top.codes[:, : k // self.spec.codes_a_byte], "scales": top.scales[:, :groups]}
        if top.zeros is not None:
            cut["zeros"] = top.zeros[:, :groups]
        if top.smooth is not None:
            cut |= {"smooth": top.smooth[:k], "down": top.down[:, :k]}
        return replace(top, **cut)


TENSOR_FIELDS = ("codes", "scales", "second_scale", "zeros", "smooth", "down", "up", "bias")
_BY_ROW = ("codes", "scales", "zeros", "up", "bias")


def expected_shapes(w: LinearWeights) -> dict[str, tuple[int, ...]]:
    """The shape every tensor of a linear must have, from its codes, rank and group."""
    n, k = w.out_features, w.in_features
    groups = (n, w.spec.groups(k))
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
    "int8": {"scales", "smooth", "down", "up"},
}


def check_linear(w: LinearWeights) -> None:
    """Raise a ValueError that names the first field whose presence, dtype or shape is wrong."""
    dtype, named = (
        (torch.int8, "int8 [N, K]") if w.spec.format == "int8" else (torch.uint8, "packed uint8 [N, K/2]")
    )
    if w.codes.dtype != dtype or w.codes.ndim != 2:
        raise ValueError(f"codes: expected {named}, got {w.codes.dtype} {list(w.codes.shape)}.")
    if w.in_features % (w.spec.group or 1):
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
