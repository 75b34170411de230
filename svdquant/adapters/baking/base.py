"""What LoRAs are baked into, and what they change of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....loaders import nunchaku
from ....loaders.checkpoint import Checkpoint
from ...core import reference, tiles
from ...core.linear import Branch
from ..conventions import straighten
from ..families import apply_role, resolve
from ..family import take_share
from .places import Piece, Place, names_of, pieces_of


@dataclass
class Changes:
    """All that the LoRAs change: branches and vectors by host layer, in the order given.

    errors   relative errors of what is not low-rank, by host layer
    """

    branches: dict[str, list[Branch]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    differences: dict[str, list[tuple[Place, Tensor, float]]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def take_vectors(self, place: Place, members: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        """Note what a LoRA does to biases and norms; returns the members that are about the weight."""
        if "diff_b" in members:
            difference = place.change(members["diff_b"]) if place.change else members["diff_b"]
            self.differences.setdefault(place.host, []).append((place, difference, strength))
        if "set_weight" in members:
            self.replaced[place.host] = members["set_weight"]
        return {tail: t for tail, t in members.items() if tail not in ("diff_b", "set_weight")}


class Base:
    """The checkpoint to bake into, Nunchaku or natural, with its family's map."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        family = resolve(checkpoint)
        if family is None:
            raise ValueError(
                f"{checkpoint.path.name}: no known model family; only a known one can be baked into."
            )
        self.checkpoint, self.family = checkpoint, family
        self.packed = checkpoint.dialect in nunchaku.WRITTEN
        self.mapped = family.map_names(checkpoint)
        self.known = names_of(checkpoint, family, self.mapped)

    def pieces(self, host: str) -> tuple[Piece, ...]:
        return pieces_of(self.checkpoint, self.mapped, host)

    def format(self, name: str) -> str:
        return self.checkpoint.info[name].spec.format

    def stored_pair(self, name: str) -> dict[str, Tensor]:
        """A stored linear's branch in natural order, padding kept: down [R, K], up [N, R]."""
        info = self.checkpoint.info[name]
        if not info.rank:
            empty = torch.zeros(0, dtype=torch.bfloat16)
            return {"down": empty.reshape(0, info.in_features), "up": empty.reshape(info.out_features, 0)}
        down, up = (self.checkpoint.stored[info.keys[field]] for field in ("down", "up"))
        if not self.packed:
            return {"down": down, "up": up}
        return {"down": tiles.untile_down(down), "up": tiles.untile_up(up)}

    def shape(self, host: str) -> tuple[int, int]:
        """Rows and columns of a host layer, or of a 16-bit tensor seen as a matrix."""
        if host in self.mapped.linears:
            last = self.pieces(host)[-1]
            return last.rows.stop, last.columns.stop
        where = self.mapped.plain[host]
        shapes = [self.checkpoint.plain_info[name].shape for name in where.names]
        _, count = where.share or (0, 1)
        return sum(shape[0] for shape in shapes) // count, math.prod(shapes[0][1:])

    def merges(self, host: str) -> bool:
        """Whether a layer is a 16-bit one, or rows of one, stored as the host has it: it takes any difference."""
        where = self.mapped.plain.get(host)
        as_it_is = where is not None and (where.change is None or where.share is not None)
        return as_it_is and len(where.names) == 1

    def weight(self, host: str) -> Tensor:
        """A host layer's dense weight in the host's order of rows: [n, k] fp32."""
        if host in self.mapped.plain:
            return self.mapped.plain[host].read(self.checkpoint.plain).flatten(1).float()
        total = torch.zeros(self.shape(host))
        for piece, (name, role) in zip(self.pieces(host), self.mapped.linears[host], strict=True):
            weights = apply_role(self.checkpoint.layers[name], role)
            weights = straighten(weights, role.splits) if role.splits else weights
            weights = take_share(weights, role.share) if role.share else weights
            total[piece.rows, piece.columns] = reference.dequantize(weights)
        return total
