"""Fold LoRAs into the low-rank branch of a Nunchaku checkpoint: a new file with more rank and the same 4-bit weights.

Every tensor keeps its bytes but the branches (and biases, norms, 16-bit layers) that a LoRA changes. What a branch
cannot hold is not approximated: modulation layers have none in this format, so their part is written beside the
checkpoint as a LoRA of its own; adapters that are not low-rank (DoRA, OFT, full differences) are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ...loaders import lora_nunchaku
from ...loaders.checkpoint import Lazy
from ...loaders.lora import read_lora
from ...loaders.lora_names import guess_family, rename
from ...loaders.nunchaku_linear import encode_linear
from ...loaders.writer import write_checkpoint
from ..core.linear import Branch
from . import bake_tensors, factors
from .bake_tensors import Base, Changes
from .fold import Place

INEXACT = {"dora_scale", "oft_blocks", "a1.weight", "diff", "w_norm"}  # tails of what is not low-rank


@dataclass(frozen=True)
class Baked:
    """What was written.

    layers       whose branch grew
    rank         the largest of them, padding included
    rest         the LoRA with what no branch can hold, for `rest_layers` layers; None where nothing was left
    unmatched    the LoRAs' tensors that belong to no layer of the checkpoint
    """

    target: Path
    layers: int
    rank: int
    rest: Path | None
    rest_layers: int
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.target.name}: {self.layers} branches wider, largest rank {self.rank}"
        if self.rest:
            text += (
                f"; {self.rest_layers} layers have no branch to fold into: apply {self.rest.name} beside it"
            )
        if self.unmatched:
            text += f"; {len(self.unmatched)} tensors not of this model, such as {self.unmatched[0]}"
        return text


def bake(
    base: Path,
    loras: Sequence[tuple[Path, float]],
    target: Path,
    *,
    rest: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Baked:
    """Write `target`: `base` with LoRAs at their strengths in its branches.

    base      a Nunchaku checkpoint, file or folder
    loras     (file, strength), in order
    rest      where to put what no branch can hold; beside the target as NAME-rest.safetensors if not given
    progress  called with (tensors done, tensors in all)

    Raises ValueError, before anything is written, for a LoRA that does not fit or has no exact place.
    """
    rest = rest or target.with_name(f"{target.stem}-rest.safetensors")
    for path in (target, rest):
        if path.exists():
            raise ValueError(f"{path.name}: expected a new file, got one that is there. Choose another name.")
    source, changes = Base(base), Changes()
    unmatched = [name for path, strength in loras for name in collect(source, path, strength, changes)]
    grown, left = bake_tensors.distribute(source, changes)
    made = bake_tensors.branch_tensors(source, grown) | bake_tensors.vector_tensors(source, changes, left)
    stored, strings = source.checkpoint.stored, bake_tensors.metadata(source.checkpoint, grown, loras)
    names = list(dict.fromkeys([*stored, *made]))

    def tensor(name: str) -> Tensor:
        if progress:
            progress(names.index(name) + 1, len(names))
        return made[name]() if name in made else stored[name]

    write_checkpoint(target, {}, Lazy(names, tensor), strings, encode_linear)
    if left:
        write_checkpoint(rest, {}, bake_tensors.rest_tensors(source, left), {"format": "pt"}, encode_linear)
    largest = max((rank for _, rank in grown.values()), default=0)
    return Baked(target, len(grown), largest, rest if left else None, len(left), tuple(unmatched))


def collect(source: Base, path: Path, strength: float, changes: Changes) -> tuple[str, ...]:
    """Add one LoRA file to the changes; returns its tensors that belong to no layer."""
    tensors = read_lora(path)
    if lora_nunchaku.detect(tensors):
        raise ValueError(
            f"{path.name}: a LoRA in Nunchaku layout replaces a checkpoint's branch. Bake the original LoRA file."
        )
    renamed = rename(path, tensors, source.known)
    if not any(not set(members) <= {"set_weight"} for members in renamed.modules.values()):
        looks = guess_family(tensors)
        raise ValueError(
            f"{path.name}: none of its {len(tensors)} tensors belongs to {source.checkpoint.path.name} "
            f"({source.family.name}).{f' It looks like a LoRA for {looks}.' if looks else ''}"
        )
    found: dict[str, list[Branch]] = {}
    for module, members in renamed.modules.items():
        place = source.known[module]
        if "diff_b" in members:
            difference = place.change(members["diff_b"]) if place.change else members["diff_b"]
            changes.differences.setdefault(place.host, []).append((place, difference, strength))
        if "set_weight" in members:
            changes.replaced[place.host] = members["set_weight"]
        weight = {tail: t for tail, t in members.items() if tail not in ("diff_b", "set_weight")}
        if weight:
            found.setdefault(place.host, []).append(_branch(source, path, module, weight, strength))
    for host, branches in found.items():  # q before k before v, whatever order the file has
        changes.branches.setdefault(host, []).extend(sorted(branches, key=lambda b: b.rows.start))
    return renamed.unmatched


def _branch(source: Base, path: Path, module: str, members: Mapping, strength: float) -> Branch:
    place, inexact = source.known[module], set(members) & INEXACT
    try:
        size = None if inexact else factors.size(members)
        found = None if inexact else factors.factor(members)
    except ValueError as error:
        raise ValueError(f"{path.name}: {module}: {error}") from None
    if found is None or any(b.up is None or b.kron is not None for b in found.branches):
        raise ValueError(
            f"{path.name}: {module}: expected a low-rank adapter, got one that a branch cannot hold exactly "
            f"({', '.join(sorted(inexact)) or 'LoKr or LoHa of too high a rank'}). Apply this LoRA at run time instead."
        )
    rows, columns = _rectangle(source, place)
    expected = (rows.stop - rows.start, columns.stop - columns.start)
    if size != expected:
        raise ValueError(
            f"{path.name}: {module}: expected {list(expected)}, got {list(size)}. Choose a LoRA made for this model."
        )
    one = found.branches[0]
    up = place.change(one.up) if place.change else one.up
    return replace(one, up=up, strength=one.strength * strength, rows=rows, columns=columns)


def _rectangle(source: Base, place: Place) -> tuple[slice, slice]:
    if place.rows is None:
        n, *rest = source.checkpoint.plain_info[source.mapped.plain[place.host].names[0]].shape
        return slice(0, n), slice(0, math.prod(rest))
    return slice(*place.rows), slice(*place.columns)


def new_file(folder: Path, name: str) -> Path:
    """The path of a new checkpoint in a folder. ValueError for a name that leads out of it."""
    plain = name.strip().removesuffix(".safetensors")
    if not plain or Path(plain).name != plain or plain.startswith("."):
        raise ValueError(
            f"{name!r}: expected the plain name of a file, got a path or nothing. Leave out folders."
        )
    return folder / f"{plain}.safetensors"
