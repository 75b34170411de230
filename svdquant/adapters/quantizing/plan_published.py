"""A 16-bit model under its host's names, and the linears of the file that its family publishes.

A family's table says how stored linears become the host's; here it is walked the other way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ....loaders.source import Change, Job, SourceModel
from ..families import FAMILIES
from ..family import Family, Layer, Names, Stored, template

ENDS = ("weight", "bias")


@dataclass(frozen=True)
class Place:
    """One of the host's linears in the published layout.

    layer   of the family's table
    index   its block numbers
    stored  the published linear it is, or is a share of
    """

    layer: Layer
    index: tuple[str, ...]
    stored: Stored

    @property
    def host(self) -> str:
        return self.layer.host.format(*self.index)

    @property
    def name(self) -> str:
        return self.stored.name.format(*self.index)


def host_names(source: SourceModel) -> tuple[Family | None, SourceModel]:
    """The family whose layout can be published from this model, if any, and the model under its host's names.

    The source has the host's names already, or those that the family's 16-bit models have elsewhere. Raises
    ValueError for a model of a known family with tensors that have no place in it.
    """
    linears = [n.removesuffix(".weight") for n, shape in source.shapes.items() if len(shape) == 2]
    for family in FAMILIES:
        published = family.published
        if (
            published
            and any(re.fullmatch(published.host, name) for name in linears)
            and _covers(family, source)
        ):
            return family, source
        patterns = [template(s.name) for layer in family.layers for s in layer.options[-1]]
        found = dict.fromkeys(name for name in linears if any(p.fullmatch(name) for p in patterns))
        names = Names(found, {n: None for n in source.shapes if n.rpartition(".")[0] not in found})
        if found and family.matches(names):
            return (family if published else None), _renamed(source, family, names)
    return None, source


def _covers(family: Family, source: SourceModel) -> bool:
    """Whether the published layout has a name for every tensor: cousins of a family may have others."""
    hosts = [place.host for members in places(family, source).values() for place in members]
    others = [name for name in source.shapes if name.rpartition(".")[0] not in set(hosts)]
    names = Names({}, dict.fromkeys(published_name(family, name)[0] for name in others))
    return not family.map_names(names).left_over


def _renamed(source: SourceModel, family: Family, names: Names) -> SourceModel:
    mapped, renamed = family.map_names(names), {}
    if mapped.left_over:
        raise ValueError(
            f"{source.path.name}: {mapped.left_over[0]}: this and {len(mapped.left_over) - 1} more tensors have no "
            f"place in a {family.name} model. Use the model's original file."
        )
    for host, pieces in mapped.linears.items():
        for end in ENDS:
            old = tuple(f"{name}.{end}" for name, _ in pieces)
            if source.shapes.keys() >= set(old):
                renamed[f"{host}.{end}"] = old, None
    return source.renamed(
        renamed | {host: (plain.names, plain.change) for host, plain in mapped.plain.items()}
    )


def places(family: Family, source: SourceModel) -> dict[str, list[Place]]:
    """Published linear -> the host's linears in it, in the order of their rows."""
    found: dict[str, list[Place]] = {}
    for layer in family.layers:
        pattern = template(f"{layer.host}.weight")
        for match in filter(None, map(pattern.fullmatch, source.shapes)):
            (stored,) = layer.options[0]
            place = Place(layer, match.groups(), stored)
            found.setdefault(place.name, []).append(place)
    return {
        name: sorted(members, key=lambda place: (place.stored.role.share or (0, 1))[0])
        for name, members in found.items()
    }


def published_jobs(
    family: Family, source: SourceModel, precision: str, rank: int
) -> tuple[SourceModel, list[Job]]:
    """The family's linears as jobs, and the source with fused ones joined, under their published names."""
    jobs, names = [], {name: ((name,), None) for name in source.shapes}
    for name, members in places(family, source).items():
        role, hosts = members[0].stored.role, [place.host for place in members]
        if len(hosts) > 1:
            for end in ENDS:
                old = tuple(f"{host}.{end}" for host in hosts)
                if names.keys() >= set(old):
                    names = {n: of for n, of in names.items() if n not in old}
                    names[f"{name}.{end}"] = old, None
        form = ("awq", 0) if role.splits else (precision, rank)
        where = name if len(hosts) > 1 else hosts[0]
        job = Job(name, where, *form, after_gelu=bool(role.act_shift), chunks=role.splits, input=hosts[0])
        jobs.append(job)
    return source.renamed(names), jobs


def published_name(family: Family, name: str) -> tuple[str, str, Change]:
    """A tensor that stays 16-bit: its name in the file, in the source, and the change between them."""
    for entry in family.plain:
        match = template(entry.host).fullmatch(name)
        if match and len(entry.names) == 1:
            return entry.names[0].format(*match.groups()), name, entry.change
    return name, name, None
