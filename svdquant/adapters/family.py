"""The mechanism behind every family table: stored linears -> the host's linears, name by name.

A table speaks in patterns with `{}` for a block index. A host layer may be made of several stored linears, by rows
(fused q/k/v, FLUX `linear1`) or by columns (FLUX `linear2`); dialects that store it differently are options of the
same layer, and the first one that is complete in the file is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

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
    share         (i, n): the host layer takes the i-th of n equal shares of the rows; None for all of them
    """

    act_shift: float = 0.0
    splits: int = 0
    out_features: int | None = None
    in_features: int | None = None
    share: tuple[int, int] | None = None


def apply_role(weights: LinearWeights, role: Role) -> LinearWeights:
    """Crop padding and mark unsigned activations; rows stay as stored (see `straighten` and `take_share`)."""
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


def take_share(weights: LinearWeights, share: tuple[int, int]) -> LinearWeights:
    """The i-th of n equal shares of a fused linear's rows, for a host that keeps them apart: share = (i, n)."""
    which, count = share
    height = weights.out_features // count
    return weights.rows(slice(which * height, (which + 1) * height))


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
    """A 16-bit tensor under another name, or several that the host keeps as one, by rows.

    `change` rewrites it where the conventions differ.
    """

    stored: str | tuple[str, ...]
    host: str
    change: Callable[[Tensor], Tensor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.stored,) if isinstance(self.stored, str) else self.stored


@dataclass(frozen=True)
class Source:
    """Where a host's 16-bit tensor comes from: stored names, joined by rows, then changed."""

    names: tuple[str, ...]
    change: Callable[[Tensor], Tensor] | None = None

    def read(self, plain: Mapping[str, Tensor]) -> Tensor:
        """A tensor of its own, no view of the file."""
        tensor = (
            plain[self.names[0]].clone()
            if len(self.names) == 1
            else torch.cat([plain[n] for n in self.names])
        )
        return self.change(tensor).contiguous() if self.change else tensor


@dataclass(frozen=True)
class Mapped:
    """A checkpoint's names on the host's: what each host linear is made of, and every plain tensor's new name."""

    linears: Mapping[str, tuple[tuple[str, Role], ...]]
    axes: Mapping[str, str]
    plain: Mapping[str, Source]
    left_over: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One model family: how to know it and how its names map.

    name     shown to users
    marker   regular expression that a stored layer name of this family, and no other, matches
    layers   host linears made of quantized ones
    plain    tensors that stay 16-bit
    same     regular expression of 16-bit tensors whose stored name is the host's
    sizes    optional: checkpoint -> {stored pattern: (out_features, in_features)} where padding hides the true ones
    kind     "diffusion model" | "text encoder": which node loads it
    """

    name: str
    marker: str
    layers: tuple[Layer, ...]
    plain: tuple[Plain, ...] = ()
    same: str = ""
    sizes: Callable[[object], Mapping[str, tuple[int, int]]] | None = field(default=None, compare=False)
    kind: str = "diffusion model"

    def matches(self, checkpoint) -> bool:
        """True when any quantized layer of the checkpoint carries the family's marker."""
        return any(re.fullmatch(self.marker, name) for name in checkpoint.info)

    def roles(self, checkpoint) -> dict[str, Role]:
        """The role of every stored layer the table knows, as a whole: {stored name: Role}."""
        mapped = self.map_names(checkpoint)
        pieces = (piece for pieces in mapped.linears.values() for piece in pieces)
        return {name: replace(role, share=None) for name, role in pieces}

    def map_names(self, checkpoint) -> Mapped:
        """Every stored name on a host name; what the table does not know is left over.

        Raises ValueError for a host layer of which only some pieces are in the file.
        """
        names, sizes = set(checkpoint.info), dict(self.sizes(checkpoint)) if self.sizes else {}
        linears, axes = {}, {}
        for layer in self.layers:
            for index in _indices(names, [s.name for option in layer.options for s in option]):
                pieces = _complete_option(names, layer, index)
                if pieces:
                    host = layer.host.format(*index)
                    linears[host] = tuple((s.name.format(*index), _sized(s, sizes)) for s in pieces)
                    axes[host] = layer.axis
        plain = self._map_plain(set(checkpoint.plain_info))
        used = {name for pieces in linears.values() for name, _ in pieces}
        used |= {name for source in plain.values() for name in source.names}
        return Mapped(linears, axes, plain, tuple(sorted((names | set(checkpoint.plain_info)) - used)))

    def _map_plain(self, names: set[str]) -> dict[str, Source]:
        plain = {name: Source((name,)) for name in sorted(names) if re.fullmatch(self.same, name)}
        for entry in self.plain:
            for index in _indices(names, entry.names):
                stored = tuple(name.format(*index) for name in entry.names)
                if names.issuperset(stored):
                    plain[entry.host.format(*index)] = Source(stored, entry.change)
        return plain


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


def shares(name: str, count: int, **role) -> tuple[tuple[tuple[Stored, ...], ...], ...]:
    """A fused linear as options of `count` host layers: the i-th takes the i-th share of its rows."""
    return tuple(((Stored(name, Role(share=(i, count), **role)),),) for i in range(count))


def modulation(name: str, splits: int) -> Stored:
    """An AdaLN linear of `splits` chunks, stored interleaved with the +1 folded in."""
    return Stored(name, Role(splits=splits))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


def _indices(names: set[str], templates: Iterable[str]) -> list[tuple[str, ...]]:
    """Block indices at which any of the patterns occurs."""
    found = set()
    for template in templates:
        if "{}" not in template:
            found |= {()} if template in names else set()
            continue
        matches = map(_pattern(template).fullmatch, names)
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
