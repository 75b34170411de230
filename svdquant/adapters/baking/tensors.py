"""The tensors that change when LoRAs are folded into a stored checkpoint, each made when the writer asks for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....loaders.checkpoint import Checkpoint, json_object
from ....loaders.nunchaku_linear import V1, V2
from ...core import tiles
from ...core.linear import Branch
from ..family import rows_of_share
from .adapter import MAX_RANK
from .base import Base, Changes
from .pairs import Pair, cut, stack, widen
from .places import PREFIX, Piece, Place

_TWIN = (
    ("mlp_fc1", "mlp_fc2"),
    ("mlp_context_fc1", "mlp_context_fc2"),
)  # its fused MLP wants one rank for both

Grown = Mapping[str, tuple[list[Pair], int]]  # stored name -> pairs beside its branch, rank after padding
Make = Callable[[], Tensor]


def distribute(source: Base, changes: Changes) -> tuple[Grown, dict[str, list[Branch]]]:
    """Sort branches to the stored linears that take them, and to the rest, by host layer.

    returns
      grown  stored name -> (pairs [(down, up)], rank after padding)
      rest   host layer -> branches that no stored branch can take
    """
    grown: dict[str, list[Pair]] = {}
    rest: dict[str, list[Branch]] = {}
    for host, branches in changes.branches.items():
        pieces = source.pieces(host) if host in source.mapped.linears else ()
        if not pieces or any(source.format(p.name) == "awq" for p in pieces):
            rest[host] = branches
            continue
        for piece in pieces:
            pairs = stack([pair for b in branches if (pair := cut(b, piece))])
            pairs = [(d, u) for d, u in pairs if bool(u.any()) and bool(d.any())]
            if pairs:
                grown.setdefault(piece.name, []).extend(_on_stored(source, piece, pair) for pair in pairs)
    ranks = _ranks(source, grown)
    over = next((name for name, rank in ranks.items() if rank > MAX_RANK), None)
    if over:
        raise ValueError(f"{over}: expected a rank up to {MAX_RANK}, got {ranks[over]}. Bake fewer LoRAs.")
    return {name: (grown.get(name, []), rank) for name, rank in ranks.items()}, rest


def _on_stored(source: Base, piece: Piece, pair: Pair) -> Pair:
    """A pair in the padded size of its stored linear."""
    info, (down, up) = source.checkpoint.info[piece.name], pair
    wide, tall = down.new_zeros(down.shape[0], info.in_features), up.new_zeros(info.out_features, up.shape[1])
    wide[:, : down.shape[1]] = down
    tall[piece.first : piece.first + up.shape[0]] = up
    return wide, tall


def _ranks(source: Base, grown: Mapping[str, list[Pair]]) -> dict[str, int]:
    """The rank every changed linear gets: padded to 16, and alike where the published engine wants it alike."""
    info = source.checkpoint.info
    ranks = {}
    for name, pairs in grown.items():
        rank = info[name].rank + sum(down.shape[0] for down, _ in pairs)
        ranks[name] = rank + (-rank % tiles.TILE_R if source.packed else 0)
    if source.checkpoint.dialect == "nunchaku_v2" and ranks:
        w4a4 = [name for name in info if source.format(name) != "awq"]
        return dict.fromkeys(w4a4, max([*ranks.values(), *(info[name].rank for name in w4a4)]))
    for pair in _TWIN if source.packed else ():
        for name in list(ranks):
            block, _, last = name.rpartition(".")
            other = f"{block}.{pair[last == pair[0]]}"
            if last in pair and other in info:
                ranks[name] = ranks[other] = max(ranks[name], ranks.get(other, info[other].rank))
    return {name: rank for name, rank in ranks.items() if name in grown or rank > info[name].rank}


def branch_tensors(source: Base, grown: Grown) -> dict[str, Make]:
    """The branches that grow, by name in the file."""
    named = vars(V2 if source.checkpoint.dialect == "nunchaku_v2" else V1) if source.packed else {}

    def make(layer: str, end: str) -> Tensor:
        pairs, rank = grown[layer]
        down, up = widen(source.stored_pair(layer), pairs)
        missing = rank - down.shape[0]
        if end == "down":
            down = pad(down, (0, 0, 0, missing))
            return tiles.tile_down(down) if source.packed else down
        up = pad(up, (0, missing))
        return tiles.tile_up(up) if source.packed else up

    tensors: dict[str, Make] = {}
    for layer in grown:
        keys = source.checkpoint.info[layer].keys
        for end in ("down", "up"):
            name = keys.get(end, f"{layer}.{named.get(end, end)}")
            tensors[name] = lambda layer=layer, end=end: make(layer, end)
    return tensors


def vector_tensors(source: Base, changes: Changes, rest: dict[str, list[Branch]]) -> dict[str, Make]:
    """Biases, norms and 16-bit weights that change, by name in the file; such weights leave `rest`."""
    tensors: dict[str, Make] = {}
    for host, entries in changes.differences.items():
        for place, difference, strength in entries:
            _add_bias(source, host, place, difference * strength, tensors)
    for host, value in changes.replaced.items():
        name = source.mapped.plain[host].names[0]
        tensors[name] = lambda n=name, v=value: v.to(source.checkpoint.stored[n])
    for host in filter(source.merges, list(rest)):
        where, branches = source.mapped.plain[host], rest.pop(host)
        _chain(tensors, source, where.names[0], lambda w, bs=branches, s=where.share: _merged(w, bs, s))
    return tensors


def _merged(weight: Tensor, branches: Sequence[Branch], share: tuple[int, int] | None) -> Tensor:
    total = weight.flatten(1).to(torch.float32, copy=True)
    host = rows_of_share(total, share=share) if share else total
    for b in branches:
        host[b.rows, b.columns] += b.difference()
    return total.to(weight.dtype).reshape(weight.shape)


def _add_bias(source: Base, host: str, place: Place, difference: Tensor, tensors: dict[str, Make]) -> None:
    """Put a bias difference on the stored bias: in a stored order that its format says."""
    module = host.removesuffix(".weight")
    if module not in source.mapped.linears:
        where = source.mapped.plain[f"{module}.bias"]
        if not source.merges(f"{module}.bias"):
            raise ValueError(
                f"{module}.bias: this model stores it in another form; apply this LoRA at run time."
            )
        _chain(tensors, source, where.names[0], lambda bias: _added(bias, difference, where.share))
        return
    first, _ = place.rows
    for piece in source.pieces(module):
        begin, end = max(first, piece.rows.start), min(first + len(difference), piece.rows.stop)
        name = source.checkpoint.info[piece.name].keys.get("bias")
        if begin >= end or name is None:
            continue
        at = slice(begin - piece.rows.start + piece.first, end - piece.rows.start + piece.first)
        values = difference[begin - first : end - first]
        packed = source.packed and source.format(piece.name) != "awq"
        _chain(
            tensors, source, name, lambda b, a=at, v=values, s=piece.splits, p=packed: _shifted(b, a, v, s, p)
        )
        if source.mapped.axes[module] == "columns":
            return  # one of the summed biases takes it


def _added(bias: Tensor, difference: Tensor, share: tuple[int, int] | None) -> Tensor:
    total = bias.clone()
    host = rows_of_share(total, share=share) if share else total
    host += difference.to(bias)
    return total


def _chain(tensors: dict[str, Make], source: Base, name: str, change: Callable[[Tensor], Tensor]) -> None:
    before = tensors.get(name) or (lambda: source.checkpoint.stored[name])
    tensors[name] = lambda: change(before())


def _shifted(bias: Tensor, at: slice, values: Tensor, splits: int, packed: bool) -> Tensor:
    if packed:
        natural = tiles.untile_vector(bias)
        natural[at] = natural[at] + values.to(bias)
        return tiles.tile_vector(natural)
    order = tiles.straight_order(len(bias), splits or 1)
    out = bias.clone()
    out[order[at]] = bias[order[at]] + values.to(bias)
    return out


def rest_tensors(source: Base, rest: Mapping[str, list[Branch]]) -> dict[str, Tensor]:
    """What no branch took, as a LoRA in ComfyUI's naming, strengths folded in."""
    tensors = {}
    for host, branches in rest.items():
        n, k = source.shape(host)
        whole = Piece(host, slice(0, n), slice(0, k), 0, 0)
        downs, ups = zip(*stack([cut(b, whole) for b in branches]), strict=True)
        module = PREFIX + host.removesuffix(".weight")
        tensors[f"{module}.lora_down.weight"] = torch.cat(downs)
        tensors[f"{module}.lora_up.weight"] = torch.cat(ups, 1)
    return tensors


def metadata(checkpoint: Checkpoint, grown: Grown, loras: Sequence[tuple[Path, float]]) -> dict[str, str]:
    """The base's metadata, the rank it states brought up to date, and what was baked."""
    strings = dict(checkpoint.metadata)
    ranks = Counter(
        grown[name][1] if name in grown else info.rank
        for name, info in checkpoint.info.items()
        if info.spec.format != "awq"
    )
    settings = json_object(strings.get("quantization_config", ""))
    if settings and ranks:
        strings["quantization_config"] = json.dumps(settings | {"rank": ranks.most_common(1)[0][0]})
    named = [f"{path.name}:{strength:g}" for path, strength in loras]
    return {**strings, "baked_loras": ", ".join([*filter(None, [strings.get("baked_loras")]), *named])}
