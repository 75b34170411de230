"""Where the names of LoRA files lead in a stored checkpoint, from its family's table alone; no host is needed.

A LoRA speaks of the host's layers or of diffusers' (q, k and v apart). A checkpoint stores linears that are rows or
columns of a host layer, or hosts take equal shares of a stored one. So a name stands for a rectangle of a host layer,
and a host layer is tiled by rectangles of stored linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..family import Family, Layer, Mapped, Stored, template
from ..lora.diffusers_names import diffusers_names

PREFIX = "diffusion_model."


@dataclass(frozen=True)
class Place:
    """What a LoRA's name stands for: a rectangle of a host layer made of quantized linears, or a 16-bit tensor.

    host           the host layer, or the host's full name of a 16-bit tensor
    rows, columns  None for a 16-bit tensor
    change         what makes the host's order of rows of the one the name speaks of, None where they are the same
    """

    host: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Piece:
    """A stored linear in a host layer.

    name           the stored linear
    rows, columns  of the host layer
    first          the stored row that the first of `rows` is; 0 unless hosts share a stored linear
    splits         modulation chunks of interleaved rows, 0 if none
    """

    name: str
    rows: slice
    columns: slice
    first: int
    splits: int


def pieces_of(checkpoint, mapped: Mapped, host: str) -> tuple[Piece, ...]:
    """The stored linears that make up a host layer, in order, with their true sizes."""
    pieces, row, column = [], 0, 0
    for name, role in mapped.linears[host]:
        info = checkpoint.info[name]
        n, k = role.out_features or info.out_features, role.in_features or info.in_features
        which, count = role.share or (0, 1)
        n //= count
        rows, columns = slice(row, row + n), slice(column, column + k)
        pieces.append(Piece(name, rows, columns, which * n, role.splits))
        row, column = (row + n, 0) if mapped.axes[host] == "rows" else (0, column + k)
    return tuple(pieces)


def names_of(checkpoint, family: Family, mapped: Mapped) -> dict[str, Place]:
    """Every name a LoRA may have for a layer of this checkpoint, in the forms that ComfyUI's own key map has."""
    known: dict[str, Place] = {}
    for host in mapped.linears:
        pieces = pieces_of(checkpoint, mapped, host)
        n, k = pieces[-1].rows.stop, pieces[-1].columns.stop
        for module, place in _aliases(family, host, pieces, mapped.axes[host]):
            known.setdefault(module, place)
        _add(known, host, Place(host, (0, n), (0, k)))
    for host in mapped.plain:
        _add(known, host.removesuffix(".weight"), Place(host))
        for plain in family.plain:
            match = len(plain.names) == 1 and template(plain.host).fullmatch(host)
            if match:
                alias = plain.names[0].format(*match.groups()).removesuffix(".weight")
                for form in _forms(alias):
                    known.setdefault(form, Place(host, change=plain.change))
    return known


def _add(known: dict[str, Place], module: str, place: Place) -> None:
    """A host module under its own name, and under diffusers' where nothing else has that."""
    known |= dict.fromkeys(_forms(module), place)
    for form in (form for name in diffusers_names(module) for form in _forms(name)):
        known.setdefault(form, place)


def _forms(module: str) -> Iterator[str]:
    yield f"{PREFIX}{module}"
    yield f"lora_unet_{module.replace('.', '_')}"


def _aliases(family: Family, host: str, pieces: Sequence[Piece], axis: str) -> Iterator[tuple[str, Place]]:
    """The stored names of every option of a host layer, whichever one the checkpoint chose."""
    for layer in family.layers:
        match = template(layer.host).fullmatch(host)
        for option in layer.options if match else ():
            spans = _spans(layer, option, pieces, axis)
            for one, span in zip(option, spans, strict=False):
                full = (0, pieces[-1].rows.stop), (0, pieces[-1].columns.stop)
                rows, columns = (span, full[1]) if axis == "rows" else (full[0], span)
                if not one.role.share:
                    for form in _forms(one.name.format(*match.groups())):
                        yield form, Place(host, rows, columns)


def _spans(
    layer: Layer, option: Sequence[Stored], pieces: Sequence[Piece], axis: str
) -> Sequence[tuple[int, int]]:
    """Where each member of an option begins and ends; q, k and v are equal thirds of what is stored fused."""
    sizes = [s.stop - s.start for s in (getattr(piece, axis) for piece in pieces)]
    if len(option) == 1:
        sizes = [sum(sizes)]
    elif len(option) == len(sizes) + 2:
        sizes = [sizes[0] // 3] * 3 + sizes[1:]
    elif len(option) + 2 == len(sizes):
        sizes = [sum(sizes[:3]), *sizes[3:]]
    elif len(option) != len(sizes):
        return ()
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
