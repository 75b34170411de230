"""Fold LoRAs into the low-rank branch of a checkpoint: a new file with more rank and the same 4-bit weights.

Every tensor keeps its bytes but the branches (and biases, norms, 16-bit layers) that a LoRA changes. What a branch
cannot hold is not rounded away: modulation layers have none in this format, so their part is written beside the
checkpoint as a LoRA of its own; what is not low-rank goes in within a limit that is asked for, or is refused.

The file is in Nunchaku layout. Other dialects are converted first; a family that has no such layout stays natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import clear_frames

import torch
from torch import Tensor

from ....loaders import lora_nunchaku, nunchaku
from ....loaders.checkpoint import Lazy
from ....loaders.detect import open_checkpoint
from ....loaders.lora import read_lora
from ....loaders.lora_belongs import check_belongs
from ....loaders.lora_names import rename
from ....loaders.nunchaku_linear import encode_linear
from ....loaders.writer import UNPORTABLE, write_checkpoint
from ...core.linear import Branch
from ..convert import convert
from ..families import native, resolve
from .adapter import Target, fit
from .base import Base, Changes
from .tensors import branch_tensors, distribute, metadata, rest_tensors, vector_tensors

LIMIT = 0.01  # relative error of a LoRA's part of a layer, where it is not low-rank
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Baked:
    """What was written.

    layers       whose branch grew
    rank         the largest of them, padding included
    added        ranks of the LoRAs, summed over the layers
    errors       relative error of what the LoRAs add, by layer where it is not exact
    rest         the LoRA with what no branch can hold, for `rest_layers` layers; None where nothing was left
    unmatched    the LoRAs' tensors that belong to no layer of the checkpoint
    """

    target: Path
    layers: int
    rank: int
    added: int
    errors: Mapping[str, float]
    rest: Path | None
    rest_layers: int
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.target.name}: {self.layers} branches wider, rank {self.added} in all, largest rank {self.rank}"
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            text += (
                f"; {len(self.errors)} layers not low-rank, largest error {self.errors[worst]:.2%} ({worst})"
            )
        else:
            text += "; exact"
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
    limit: float = LIMIT,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Baked:
    """Write `target`: `base` with LoRAs at their strengths in its branches.

    base      a checkpoint of any dialect, file or folder
    loras     (file, strength), in order
    rest      where to put what no branch can hold; beside the target as NAME-rest.safetensors if not given
    limit     largest relative error of what is not low-rank: a difference, DoRA, OFT, LoHa and LoKr of high rank
    overwrite whether files of these names are replaced, and not refused
    progress  called with (steps done, steps in all) of what is being done

    Raises ValueError, before anything is written, for a LoRA that does not fit or has no place within the limit.
    """
    check_numbers(loras, limit)
    rest = rest or target.with_name(f"{target.stem}-rest.safetensors")
    for path in (target, rest):
        if path.exists() and not overwrite:
            raise ValueError(f"{path.name}: expected a new file, got one that is there. Choose another name.")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path.name}: expected a folder {path.parent}, got none. Make it first.")
    step = progress or (lambda done, total: None)
    with bakeable(base, target.parent, step) as ready:
        return _write(Base(open_checkpoint(ready)), loras, target, rest, limit, step)


def check_numbers(loras: Sequence[tuple[Path, float]], limit: float) -> None:
    """ValueError for a strength that would make every weight NaN, or a limit that is none."""
    for path, strength in loras:
        if not math.isfinite(strength):
            raise ValueError(f"{path.name}: expected a strength such as 1, got {strength}. Give a number.")
    if not 0 <= limit < 1:
        raise ValueError(
            f"error: expected a relative error from 0 to below 1, got {limit:g}. {LIMIT:g} is 1 %."
        )


@contextmanager
def bakeable(path: Path, folder: Path, step: Progress) -> Iterator[Path]:
    """The checkpoint in a dialect that can be baked into, converted for the time being where it is in another.

    A path: nobody may hold the converted file's memory map in the end, or Windows keeps the file.
    """
    checkpoint = open_checkpoint(path)
    # A family without a table of its own stays natural: only a table knows where Nunchaku's layout shifts activations.
    natural = isinstance(resolve(checkpoint), native.Native)
    if checkpoint.dialect in (("natural",) if natural else nunchaku.WRITTEN):
        yield path
        return
    with TemporaryDirectory(dir=folder, prefix=".bake-", ignore_cleanup_errors=True) as scratch:
        converted = Path(scratch) / f"{path.stem}.safetensors"
        dialect = "natural" if natural else "nunchaku"
        convert(checkpoint, converted, dialect, progress=lambda _, done, total: step(done, total))
        try:
            yield converted
        except BaseException as error:
            clear_frames(error.__traceback__)  # which hold it too
            raise


def _write(
    source: Base,
    loras: Sequence[tuple[Path, float]],
    target: Path,
    rest: Path,
    limit: float,
    step: Progress,
) -> Baked:
    changes = Changes()
    unmatched = [
        name for path, strength in loras for name in collect(source, path, strength, changes, limit, step)
    ]
    grown, left = distribute(source, changes)
    made = branch_tensors(source, grown) | vector_tensors(source, changes, left)
    stored, strings = source.checkpoint.stored, metadata(source.checkpoint, grown, loras)
    names = list(dict.fromkeys([*stored, *made]))

    def tensor(name: str) -> Tensor:
        step(names.index(name) + 1, len(names))
        return made[name]() if name in made else stored[name]

    write_checkpoint(target, {}, Lazy(names, tensor), strings, encode_linear)
    if left:
        write_checkpoint(rest, {}, rest_tensors(source, left), {"format": "pt"}, encode_linear)
    return Baked(
        target,
        layers=len(grown),
        rank=max((rank for _, rank in grown.values()), default=0),
        added=sum(down.shape[0] for pairs, _ in grown.values() for down, _ in pairs),
        errors=changes.errors,
        rest=rest if left else None,
        rest_layers=len(left),
        unmatched=tuple(unmatched),
    )


def collect(
    source: Base, path: Path, strength: float, changes: Changes, limit: float, step: Progress
) -> tuple[str, ...]:
    """Add one LoRA file to the changes; returns its tensors that belong to no layer."""
    tensors = read_lora(path)
    if lora_nunchaku.detect(tensors):
        raise ValueError(
            f"{path.name}: a LoRA in Nunchaku layout replaces a checkpoint's branch. Bake the original LoRA file."
        )
    renamed = rename(path, tensors, source.known)
    matched = any(not set(members) <= {"set_weight"} for members in renamed.modules.values())
    check_belongs(path, tensors, renamed, source.known, matched=matched)
    found: dict[str, list[Branch]] = {}
    for done, (module, members) in enumerate(renamed.modules.items(), 1):
        place = source.known[module]
        weight = changes.take_vectors(place, members, strength)
        if weight:
            try:
                branch = _branch(source, module, weight, strength, changes, limit)
            except ValueError as error:
                raise ValueError(f"{path.name}: {module}: {error}") from None
            found.setdefault(place.host, []).append(branch)
        step(done, len(renamed.modules))
    for host, branches in found.items():  # q before k before v, whatever order the file has
        changes.branches.setdefault(host, []).extend(sorted(branches, key=lambda b: b.rows.start))
    return renamed.unmatched + renamed.text_encoder


def _branch(
    source: Base, module: str, members: Mapping[str, Tensor], strength: float, changes: Changes, limit: float
) -> Branch:
    place = source.known[module]
    n, k = source.shape(place.host)
    rows, columns = slice(*(place.rows or (0, n))), slice(*(place.columns or (0, k)))

    def weight() -> Tensor:
        if place.change:
            raise ValueError(
                "this model stores the layer in another order, so an adapter that looks at its weight cannot be "
                "baked. Apply this LoRA at run time instead."
            )
        before = source.weight(place.host)
        for branch in changes.branches.get(place.host, ()):
            before[branch.rows, branch.columns] += branch.difference()
        return before[rows, columns]

    shape = (rows.stop - rows.start, columns.stop - columns.start)
    found = fit(members, strength, Target(shape, weight, limit, not source.merges(place.host)))
    if found.error:
        changes.errors[place.host] = max(found.error, changes.errors.get(place.host, 0.0))
    if not found.branches:  # a difference of nothing
        return Branch(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0), 1.0, rows, columns)
    branch = replace(found.branches[0], rows=rows, columns=columns)
    return replace(branch, up=place.change(branch.up)) if place.change else branch


def new_file(folder: Path, name: str) -> Path:
    """The path of a new checkpoint in a folder. ValueError for a name that leads out, or that some systems lack."""
    plain = name.strip().removesuffix(".safetensors")
    if not plain or Path(plain).name != plain or plain.startswith(".") or (UNPORTABLE | {"\\"}) & set(plain):
        raise ValueError(
            f"{name!r}: expected the plain name of a file, got a path, nothing, or one of "
            f"{' '.join(sorted(UNPORTABLE))}. Leave those and folders out."
        )
    return folder / f"{plain}.safetensors"
