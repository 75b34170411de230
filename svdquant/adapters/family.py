"""The mechanism behind every family table: stored linears -> the host's linears, name by name.

A table speaks in patterns with `{}` for a block index. A host layer may be made of several stored linears, by rows
(fused q/k/v, FLUX `linear1`) or by columns (FLUX `linear2`); dialects that store it differently are options of the
same layer, and the first one that is complete in the file is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import Tensor

from ..core.linear import Part
from ..core.weights import GELU_SHIFT, LinearWeights
from .conventions import ENGINE_DIALECTS, holds_shift

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Role:
    """What a stored linear's place in the model says and its tensors do not.

    act_shift     activations are unsigned after this shift (int4 files of the engine only)
    shift_in_bias whether only where the bias shows that (writers of this family differ)
    splits        modulation chunks: rows are interleaved and the scale chunks' bias holds a folded +1; 0 if none
                  (files of the engine only, see `conventions.py`)
    out_features  true sizes below the padding, None where the stored ones are true
    in_features
    share         (i, n): the host layer takes the i-th of n equal shares of the rows; None for all of them
    """

    act_shift: float = 0.0
    shift_in_bias: bool = False
    splits: int = 0
    out_features: int | None = None
    in_features: int | None = None
    share: tuple[int, int] | None = None


def apply_role(weights: LinearWeights, role: Role) -> LinearWeights:
    """Crop padding and mark unsigned activations; rows stay as stored (see `take_share` and `conventions.py`)."""
    if role.out_features or role.in_features:
        n, k = role.out_features or weights.out_features, role.in_features or weights.in_features
        weights = weights.crop(n, k)
    unsigned = role.act_shift and weights.spec.format == "int4"
    if unsigned and (not role.shift_in_bias or holds_shift(weights)):
        weights = replace(weights, spec=replace(weights.spec, act_shift=role.act_shift))
    return weights


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

    `change` rewrites it where the conventions differ. That of a whole tensor undoes itself when done twice.
    """

    stored: str | tuple[str, ...]
    host: str
    change: Callable[[Tensor], Tensor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.stored,) if isinstance(self.stored, str) else self.stored


@dataclass(frozen=True)
class Source:
    """Where a host's 16-bit tensor comes from: stored names, joined by rows, then changed.

    share   (i, n): the change is to take the i-th of n equal shares of the rows, as in a Role
    """

    names: tuple[str, ...]
    change: Callable[[Tensor], Tensor] | None = None
    share: tuple[int, int] | None = None

    def read(self, plain: Mapping[str, Tensor]) -> Tensor:
        """A tensor of its own, no view of the file or of more rows."""
        tensors = [plain[name] for name in self.names]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        changed = self.change(tensor) if self.change else tensor
        return changed.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Names:
    """The names of a file, for those who have no checkpoint at hand: what `Family.map_names` looks at."""

    info: Mapping[str, object]
    plain_info: Mapping[str, object] = field(default_factory=dict)
    dialect: str = ENGINE_DIALECTS[0]


@dataclass(frozen=True)
class Mapped:
    """A checkpoint's names on the host's: what each host linear is made of, and every plain tensor's new name."""

    linears: Mapping[str, tuple[tuple[str, Role], ...]]
    axes: Mapping[str, str]
    plain: Mapping[str, Source]
    left_over: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """How a family's files are published in the engine's dialect, for a quantizer that makes one.

    host      regular expression of a matrix, by its name in the host, that only this family's models have
    metadata  shapes of the 16-bit model, in the host's names -> the header's strings
    """

    host: str
    metadata: Callable[[Shapes], Mapping[str, str]] = field(compare=False)


@dataclass(frozen=True)
class Family:
    """One model family: how to know it and how its names map.

    name       shown to users
    marker     regular expression that a stored layer name of this family, and no other, matches
    layers     host linears made of quantized ones; of their options the first is the published one, the last has
               the names that 16-bit models use
    plain      tensors that stay 16-bit
    same       regular expression of 16-bit tensors whose stored name is the host's
    beside     regular expression that a 16-bit tensor has to match too, where layers alone could be another family's
    optional   regular expression of host tensors that files may lack, because the model does not use them
    strict     whether a 16-bit tensor that the host has no place for means a wrong file
    sizes      optional: shapes of the 16-bit tensors -> {stored pattern: (out_features, in_features)} where padding
               hides the true ones
    published  optional: how a quantizer writes the published layout
    kind       "diffusion model" | "text encoder": which node loads it
    """

    name: str
    marker: str
    layers: tuple[Layer, ...]
    plain: tuple[Plain, ...] = ()
    same: str = ""
    beside: str = ""
    optional: str = ""
    strict: bool = True
    sizes: Callable[[Shapes], Mapping[str, tuple[int, int]]] | None = field(default=None, compare=False)
    published: Published | None = None
    kind: str = "diffusion model"

    def matches(self, checkpoint) -> bool:
        """True when any quantized layer of the checkpoint carries the family's marker."""
        if self.beside and not any(re.fullmatch(self.beside, name) for name in checkpoint.plain_info):
            return False
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
        names, sizes = set(checkpoint.info), self.sizes(_shapes(checkpoint)) if self.sizes else {}
        engine = checkpoint.dialect in ENGINE_DIALECTS
        linears, axes = {}, {}
        for layer in self.layers:
            for index in _indices(names, [s.name for option in layer.options for s in option]):
                pieces = _complete_option(names, layer, index)
                if pieces:
                    host = layer.host.format(*index)
                    linears[host] = tuple((s.name.format(*index), _role(s, sizes, engine)) for s in pieces)
                    axes[host] = layer.axis
        plain = self._map_plain(set(checkpoint.plain_info))
        used = {name for pieces in linears.values() for name, _ in pieces}
        used |= {name for source in plain.values() for name in source.names}
        return Mapped(linears, axes, plain, tuple(sorted((names | set(checkpoint.plain_info)) - used)))

    def _map_plain(self, names: set[str]) -> dict[str, Source]:
        shares = dict(self._dense_shares(names))
        fused = {name for source in shares.values() for name in source.names}
        plain = {name: Source((name,)) for name in sorted(names - fused) if re.fullmatch(self.same, name)}
        for entry in self.plain:
            for index in _indices(names, entry.names):
                stored = tuple(name.format(*index) for name in entry.names)
                if names.issuperset(stored):
                    plain[entry.host.format(*index)] = Source(stored, entry.change)
        return plain | shares

    def _dense_shares(self, names: set[str]) -> Iterator[tuple[str, Source]]:
        """Fused linears that stay 16-bit, for hosts that keep them apart."""
        for layer in self.layers:
            stored = layer.options[0][0]
            for end in ("weight", "bias") if stored.role.share else ():
                for index in _indices(names, [f"{stored.name}.{end}"]):
                    name, share = f"{stored.name.format(*index)}.{end}", stored.role.share
                    source = Source((name,), partial(rows_of_share, share=share), share)
                    yield f"{layer.host.format(*index)}.{end}", source


def rows_of_share(tensor: Tensor, *, share: tuple[int, int]) -> Tensor:
    """A view of the i-th of n equal shares of a tensor's rows: share = (i, n)."""
    which, count = share
    return tensor.chunk(count)[which]


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


def swap_halves(t: Tensor) -> Tensor:
    """A modulation of two chunks: diffusers keeps (scale, shift) where FLUX keeps (shift, scale)."""
    scale, shift = t.chunk(2)
    return torch.cat((shift, scale))


def modulation(name: str, splits: int) -> Stored:
    """An AdaLN linear of `splits` chunks, stored interleaved with the +1 folded in."""
    return Stored(name, Role(splits=splits))


@cache
def template(text: str) -> re.Pattern[str]:
    """A pattern with `{}` for block numbers as a regular expression with a group for each."""
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)"))


def _indices(names: set[str], templates: Iterable[str]) -> list[tuple[str, ...]]:
    """Block indices at which any of the patterns occurs."""
    found = set()
    for text in templates:
        if "{}" not in text:
            found |= {()} if text in names else set()
            continue
        matches = map(template(text).fullmatch, names)
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


def _shapes(checkpoint) -> Shapes:
    return {name: info.shape for name, info in checkpoint.plain_info.items() if info is not None}


def _role(stored: Stored, sizes: Mapping[str, tuple[int, int]], engine: bool) -> Role:
    n, k = sizes.get(stored.name, (None, None))
    role = replace(stored.role, out_features=n, in_features=k)
    return role if engine else replace(role, act_shift=0.0, splits=0)
