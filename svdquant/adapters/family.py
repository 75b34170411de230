"""The mechanism behind every family table: stored linears -> the host's linears, name by name.

A table speaks in patterns with `{}` for a block index. A host layer may be made of several stored linears, by rows
(fused q/k/v, FLUX `linear1`) or by columns (FLUX `linear2`); dialects that store it differently are options of the
same layer, and the first one that is complete in the file is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.linear import Part
from ..core.weights import GELU_SHIFT, LinearWeights


@dataclass(frozen=True)
class Role:
    """What a stored linear's place in the model says and its tensors do not.

    act_shift     activations are unsigned after this shift (int4 files only)
    splits        modulation chunks: rows are interleaved and the scale chunks' bias holds a folded +1; 0 if none
    out_features  true sizes below the padding, None where the stored ones are true
    in_features
    """

    act_shift: float = 0.0
    splits: int = 0
    out_features: int | None = None
    in_features: int | None = None


def apply_role(weights: LinearWeights, role: Role) -> LinearWeights:
    """Crop padding and mark unsigned activations; modulation rows stay as stored (see `straighten`)."""
    if role.out_features or role.in_features:
        n, k = role.out_features or weights.out_features, role.in_features or weights.in_features
        weights = weights.crop(n, k)
    if role.act_shift and weights.spec.format == "int4":
        weights = replace(weights, spec=replace(weights.spec, act_shift=role.act_shift))
    return weights


def straighten(weights: LinearWeights, splits: int) -> LinearWeights:
    """A modulation linear in the model's own order: rows un-interleaved, the folded +1 taken out of the bias.

    Stored row j*S + s is row s*d + j; scale chunks are s = 1 and, for S = 6, s = 4. The bias comes back in fp32,
    because 16 bits cannot hold every (b + 1) - 1.
    """
    n = weights.out_features
    order = torch.arange(n).reshape(n // splits, splits).T.reshape(-1)
    straight = weights.rows(order)
    bias = straight.bias.float().reshape(splits, -1).clone()
    bias[1::3] -= 1
    return replace(straight, bias=bias.reshape(-1))


@dataclass(frozen=True)
class Stored:
    """A stored linear by its name pattern, and its role."""

    name: str
    role: Role = Role()


@dataclass(frozen=True)
class Layer:
    """A host linear and the ways files store it: each option is one or more stored linears along `axis`."""

    host: str
    options: tuple[tuple[Stored, ...], ...]
    axis: str = "rows"


@dataclass(frozen=True)
class Plain:
    """A 16-bit tensor under another name; `change` rewrites it where the conventions differ."""

    stored: str
    host: str
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Mapped:
    """A checkpoint's names on the host's: what each host linear is made of, and every plain tensor's new name."""

    linears: Mapping[str, tuple[tuple[str, Role], ...]]
    axes: Mapping[str, str]
    plain: Mapping[str, tuple[str, Callable[[Tensor], Tensor] | None]]
    left_over: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One model family: how to know it and how its names map.

    name     shown to users
    marker   regular expression that a stored layer name of this family, and no other, matches
    layers   host linears made of quantized ones
    plain    tensors that stay 16-bit
    sizes    optional: checkpoint -> {stored pattern: (out_features, in_features)} where padding hides the true ones
    """

    name: str
    marker: str
    layers: tuple[Layer, ...]
    plain: tuple[Plain, ...] = ()
    sizes: Callable[[object], Mapping[str, tuple[int, int]]] | None = field(default=None, compare=False)

    def matches(self, checkpoint) -> bool:
        """True when any quantized layer of the checkpoint carries the family's marker."""
        return any(re.fullmatch(self.marker, name) for name in checkpoint.info)

    def roles(self, checkpoint) -> dict[str, Role]:
        """The role of every stored layer the table knows: {stored name: Role}."""
        mapped = self.map_names(checkpoint)
        return {name: role for pieces in mapped.linears.values() for name, role in pieces}

    def map_names(self, checkpoint) -> Mapped:
        """Every stored name on a host name; what the table does not know is left over.

        Raises ValueError for a host layer of which only some pieces are in the file.
        """
        names, sizes = set(checkpoint.info), dict(self.sizes(checkpoint)) if self.sizes else {}
        linears, axes = {}, {}
        for layer in self.layers:
            for index in _indices(names, layer):
                pieces = _complete_option(names, layer, index)
                if pieces:
                    host = layer.host.format(*index)
                    linears[host] = tuple((s.name.format(*index), _sized(s, sizes)) for s in pieces)
                    axes[host] = layer.axis
        plain, unknown = self._map_plain(checkpoint.plain_info)
        used = {name for pieces in linears.values() for name, _ in pieces}
        return Mapped(linears, axes, plain, tuple(sorted((names - used) | unknown)))

    def _map_plain(self, names: Iterable[str]):
        plain, unknown = {}, set()
        for name in names:
            entry = next((p for p in self.plain if _pattern(p.stored).fullmatch(name)), None)
            if entry is None:
                unknown.add(name)
            else:
                index = _pattern(entry.stored).fullmatch(name).groups()
                plain[entry.host.format(*index)] = (name, entry.change)
        return plain, unknown


def assemble(pieces: Iterable[LinearWeights], axis: str) -> tuple[tuple[Part, ...], Tensor | None]:
    """Lay stored linears side by side as one host layer.

    returns
      parts   without their biases
      bias    [N] or None   rows: concatenated, zeros where a piece has none; columns: summed in fp32
    """
    parts, row, column = [], 0, 0
    biases: list[Tensor | None] = []
    for w in pieces:
        parts.append(Part(replace(w, bias=None), row, column))
        biases.append(w.bias)
        row, column = (row + w.out_features, 0) if axis == "rows" else (0, column + w.in_features)
    if all(b is None for b in biases):
        return tuple(parts), None
    filled = [
        torch.zeros(p.weights.out_features) if b is None else b for p, b in zip(parts, biases, strict=True)
    ]
    if len(filled) == 1:
        return tuple(parts), filled[0]
    if axis == "rows":
        return tuple(parts), torch.cat(filled)
    return tuple(parts), torch.stack([b.float() for b in filled]).sum(0)


def unsigned(name: str) -> Stored:
    """A linear whose int4 activations are unsigned because a GELU comes before it."""
    return Stored(name, Role(act_shift=GELU_SHIFT))


def modulation(name: str, splits: int) -> Stored:
    """An AdaLN linear of `splits` chunks, stored interleaved with the +1 folded in."""
    return Stored(name, Role(splits=splits))


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


def _indices(names: set[str], layer: Layer) -> list[tuple[str, ...]]:
    """Block indices at which any piece of any option occurs."""
    found = set()
    for option in layer.options:
        for stored in option:
            matches = map(_pattern(stored.name).fullmatch, names)
            found |= {m.groups() for m in matches if m}
    return sorted(found, key=lambda index: [int(i) for i in index])


def _complete_option(names: set[str], layer: Layer, index: tuple[str, ...]) -> tuple[Stored, ...]:
    present = [[s for s in option if s.name.format(*index) in names] for option in layer.options]
    for option, found in zip(layer.options, present, strict=True):
        if len(found) == len(option):
            return option
    option, found = max(zip(layer.options, present, strict=True), key=lambda pair: len(pair[1]))
    missing = [s.name.format(*index) for s in option if s not in found]
    raise ValueError(
        f"{layer.host.format(*index)}: expected {len(option)} stored linears, {', '.join(missing)} missing. "
        "The file is incomplete; download it again."
    )


def _sized(stored: Stored, sizes: Mapping[str, tuple[int, int]]) -> Role:
    if stored.name not in sizes:
        return stored.role
    n, k = sizes[stored.name]
    return replace(stored.role, out_features=n, in_features=k)
