"""Which of a model's linears read the same input and quantize it alike, found once at load.

Published files fuse linears that the host keeps apart (q, k and v; a SwiGLU's two inputs). The family tables say so,
and thereby which of the host's linears are fed by one tensor, however a file stores them: fused, or apart with the
same smoothing and `down`. Parts of one host layer are fed by one tensor anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..core.linear import Part
from ..core.sharing import Input, Reader
from . import layout
from .families import FAMILIES
from .family import template


def share_inputs(state_dict: dict[str, Tensor]) -> None:
    """Say in every quantized tensor of a host's state dict which of its parts share their quantized input.

    They do where the very bits of spec, smoothing and `down` are equal, so that sharing changes no bit of a result.
    """
    fed = defaultdict(list)
    for key, weight in state_dict.items():
        if isinstance(weight, QuantizedTensor):
            parts = enumerate(layout.unpack(weight._qdata, weight._params))
            whole = [(key, i, part) for i, part in parts if part.weights.in_features == weight.shape[1]]
            fed[_source(key)] += whole
    readers: dict[str, dict[int, Reader]] = defaultdict(dict)
    for source, parts in fed.items():
        for alike in _alike(parts):
            shared = Input(source, len(alike))
            for number, (key, i, _) in enumerate(alike):
                readers[key][i] = Reader(shared, number)
    for key, marks in readers.items():
        state_dict[key] = layout.with_readers(state_dict[key], marks)


def _source(key: str) -> str:
    """A name for what feeds a host linear: the published one it is a share of, or itself."""
    for host, stored in _shares():
        if match := template(host).fullmatch(key):
            return stored.format(*match.groups())
    return key


@cache
def _shares() -> tuple[tuple[str, str], ...]:
    """Patterns of the host's linears (keys of their weights) that are shares of published ones, with those."""
    first = ((layer.host, layer.options[0][0]) for family in FAMILIES for layer in family.layers)
    return tuple((f"{host}.weight", stored.name) for host, stored in first if stored.role.share)


Placed = tuple[str, int, Part]  # key, number of the part, part


def _alike(parts: Iterable[Placed]) -> Iterator[list[Placed]]:
    """The parts that quantize alike, two or more together."""
    rest = [placed for placed in parts if placed[2].weights.spec.format != "awq"]
    while len(rest) > 1:
        first = rest[0][2]
        together = [placed for placed in rest if _same_quantizer(first, placed[2])]
        rest = [placed for placed in rest if all(placed is not other for other in together)]
        if len(together) > 1:
            yield together


def _same_quantizer(one: Part, other: Part) -> bool:
    a, b = one.weights, other.weights
    return a.spec == b.spec and _same_bits(a.smooth, b.smooth) and _same_bits(a.down, b.down)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    like = a.dtype == b.dtype and a.shape == b.shape
    return like and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
