"""Our quantized tensor: one flat buffer that holds everything a layer needs.

The host moves, pins, streams and measures a layer by `.weight` alone. So codes, scales, smooth and the low-rank pair
of all parts of the layer lie in one uint8 tensor, and a manifest says where. Copying a layer is copying one tensor;
reading it back is taking views. The class that carries it is the host's own `comfy_kitchen.QuantizedTensor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..core import linear as core
from ..core import reference
from ..core.linear import Branch, Part
from ..core.sharing import Reader
from ..core.weights import LinearWeights, QuantSpec
from ..kernels import ops

NAME = "SVDQuantLayout"
ALIGNMENT = 256  # bytes; a cache line for every reader and what device allocators give


@dataclass(frozen=True)
class Field:
    """Where one tensor of a part lies in the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """One part: its spec, its place in the host layer, its fields, and with whom it shares its quantized input."""

    spec: QuantSpec
    row: int
    column: int
    fields: tuple[Field, ...]
    reader: Reader | None = field(default=None, compare=False)  # or each layer would be compiled anew


@dataclass(frozen=True)
class Params:
    """What the host keeps beside the buffer; a layer's own holds no tensor, so that nothing is moved twice.

    branches   LoRAs that are part of the weight, in a state dict's copy of it; see `with_branches`
    """

    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    entries: tuple[Entry, ...]
    branches: tuple[Branch, ...] = ()

    def to_device(self, device: torch.device) -> Params:
        if not self.branches:
            return self
        return replace(self, branches=tuple(b.map(lambda t: t.to(device)) for b in self.branches))

    def clone(self) -> Params:
        return self

    def copy_from(self, src: Params, non_blocking: bool = False) -> None:
        """Nothing lives here but the manifest, and both sides have the same one."""


def pack(parts: Sequence[Part], dtype: torch.dtype) -> QuantizedTensor:
    """Lay the parts of a host layer into one buffer.

    parts    natural linears with their place; they must tile the layer
    dtype    the 16-bit dtype the host believes the weight has
    returns  a quantized tensor of logical shape [N, K]
    """
    entries, offset = [], 0
    for part in parts:
        fields = []
        for name, tensor in part.weights.tensors().items():
            fields.append(Field(name, tensor.dtype, tuple(tensor.shape), offset))
            offset += -(-fields[-1].nbytes // ALIGNMENT) * ALIGNMENT
        entries.append(Entry(part.weights.spec, part.row, part.column, tuple(fields)))
    buffer = torch.empty(offset, dtype=torch.uint8)  # the gaps between fields are never read
    for part, entry in zip(parts, entries, strict=True):
        for place, tensor in zip(entry.fields, part.weights.tensors().values(), strict=True):
            _view(buffer, place).copy_(tensor)
    shape = (max(p.rows.stop for p in parts), max(p.columns.stop for p in parts))
    return QuantizedTensor(buffer, NAME, Params(dtype, shape, tuple(entries)))


def with_readers(weight: QuantizedTensor, readers: Mapping[int, Reader]) -> QuantizedTensor:
    """The same buffer, with parts (by number) that share their quantized input with others."""
    params = weight._params
    entries = tuple(replace(entry, reader=readers.get(i)) for i, entry in enumerate(params.entries))
    return QuantizedTensor(weight._qdata, NAME, replace(params, entries=entries))


def with_branches(weight: QuantizedTensor, branches: tuple[Branch, ...]) -> QuantizedTensor:
    """A layer's weight as a state dict shows it: the same buffer, and the LoRAs that the host would have merged.

    The host's control LoRAs build a ControlNet out of it.
    """
    return QuantizedTensor(weight._qdata, NAME, replace(weight._params, branches=branches))


def unpack(buffer: Tensor, params: Params) -> tuple[Part, ...]:
    """The parts as views of the buffer, on whatever device it is."""
    return tuple(
        Part(LinearWeights(e.spec, **{f.name: _view(buffer, f) for f in e.fields}), e.row, e.column, e.reader)
        for e in params.entries
    )


@dataclass(frozen=True, eq=False)
class _Made:
    """Parts, and what they were made of; addresses tell whether a tensor was given other memory since."""

    params: Params
    bias: Tensor | None
    addresses: tuple[int, int]
    parts: Sequence[Part]

    def still_of(self, weight: QuantizedTensor, bias: Tensor | None) -> bool:
        same = self.params.entries is weight._params.entries and self.bias is bias
        return same and self.addresses == _addresses(weight._qdata, bias)


def _addresses(buffer: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return buffer.data_ptr(), 0 if bias is None else bias.data_ptr()


_made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by buffer, and dropped with it


def parts_of(weight: QuantizedTensor, bias: Tensor | None) -> Sequence[Part]:
    """The parts of a layer with its bias, made once for as long as its buffer lives.

    Views and their checks take longer than a small product. A layer that is streamed has another buffer at each step,
    and its parts go with it. torch.compile sees them made, since it traces no dictionary of weak references.
    """
    buffer, params = weight._qdata, weight._params
    if torch.compiler.is_compiling():
        return core.with_bias(unpack(buffer, params), bias)
    made = _made.get(buffer)
    if made is None or not made.still_of(weight, bias):
        views = unpack(
            buffer.detach(), params
        )  # of an alias: views of the buffer would keep it, their own key, alive
        parts = core.with_bias(views, bias)
        made = _made[buffer] = _Made(params, bias, _addresses(buffer, bias), parts)
    return made.parts


def _view(buffer: Tensor, field: Field) -> Tensor:
    return buffer[field.offset : field.offset + field.nbytes].view(field.dtype).view(field.shape)


def dense(parts: Sequence[Part], shape: tuple[int, int], bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The layer as an ordinary 16-bit one would hold it.

    returns
      weight  [N, K]        fp32   codes * scales / smooth + up @ down of every part
      bias    [N] or None   fp32   without the shift compensation that unsigned parts have in theirs
    """
    weight = torch.zeros(shape, dtype=torch.float32, device=parts[0].weights.codes.device)
    for part in parts:
        weight[part.rows, part.columns] = reference.dequantize(part.weights)
    return weight, None if bias is None else bias.float() + shift_compensation(parts, shape[0])


def shift_compensation(parts: Sequence[Part], out_features: int) -> Tensor:
    """What unsigned parts take out of their bias, [N] fp32; zeros where no part is unsigned."""
    total = torch.zeros(out_features, dtype=torch.float32, device=parts[0].weights.codes.device)
    for part in parts:
        total[part.rows] += reference.shift_compensation(part.weights)
    return total


class SVDQuantLayout(QuantizedLayout):
    """The host's view of the buffer: how to make a dense weight of it. It cannot be made from one."""

    Params = Params

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs):
        raise NotImplementedError(
            "SVDQuant weights are made by the quantizer, not by a cast: needs calibration."
        )

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        weight, _ = dense(unpack(qdata, params), params.orig_shape, None)
        for branch in params.branches:
            weight[branch.rows, branch.columns] += branch.difference()
        return weight.to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        return {"": qdata}


def register() -> None:
    """Make the layout known to the host's quantized tensor; harmless when repeated."""
    register_layout_class(NAME, SVDQuantLayout)
    register_layout_op(torch.ops.aten.linear.default, SVDQuantLayout)(_linear)


def _linear(qt: QuantizedTensor, args, kwargs) -> Tensor:
    """F.linear(x, W, bias) by code that holds the weight itself instead of calling the layer."""
    x, w, bias = (*args, None)[:3]
    return core.forward(x, parts_of(w, bias), None, w._params.branches, ops)
