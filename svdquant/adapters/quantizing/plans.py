"""From a 16-bit model to the list of linears to write.

Families that are published in Nunchaku's layout get it; any other model keeps its host's names. The family tables say
how stored linears become the host's; a plan walks them the other way. Nothing here needs a ComfyUI.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import replace
from functools import partial

from ....loaders import natural, nunchaku
from ....loaders.detect import TEXT_ENCODER
from ....loaders.plan import Plan
from ....loaders.source import Job, SourceModel
from ...core.weights import AWQ, INT4, NVFP4
from ..families import flux, native, resolve
from ..family import Names
from .plan_flux import flux_jobs, flux_metadata, flux_names, stored_name
from .plan_published import host_names, published_jobs, published_name

GROUPS = {"int4": INT4.group, "nvfp4": NVFP4.group, "awq": AWQ.group}
KEPT = (
    "*embed*",
    "*emb_layers*",
    "*_in.*",
    "*_in",
    "*final_layer*",
    "*norm*",
    "*proj_out",
    "*adaln*",
    "t_block.*",
    "*label_emb*",
    "*_emb.*",
    "*time*",
    "*guidance*",
    "out.*",
)
MODEL = "model"  # the family of those that have no layout of their own
SMALLEST = 128 * 128  # of a linear: below, 4 bits save nothing worth the error


def make_plan(
    source: SourceModel,
    *,
    precision: str = "int4",
    rank: int = 32,
    centred: bool = False,
    overrides: tuple[tuple[str, str], ...] = (),
) -> Plan:
    """A plan for a model of any family.

    precision  int4 | nvfp4
    rank       of every branch that is large enough for it
    centred    let biases take the mean out of inputs where that is free; LoRAs then see other inputs
    overrides  (pattern of file names, int4 | nvfp4 | awq | plain), the last that matches wins; a published layout
               that has no place for such a form gives way to the natural one

    Raises ValueError for settings that no file can hold, a text encoder, or a model without linears worth quantizing.
    """
    if precision not in ("int4", "nvfp4"):
        raise ValueError(f"precision: expected int4 or nvfp4, got {precision!r}.")
    if not 0 <= rank <= 256 or rank % 16:
        raise ValueError(f"rank: expected a multiple of 16 up to 256, got {rank}.")
    if any(re.match(TEXT_ENCODER, name) for name in source.shapes):
        raise ValueError(
            f"{source.path.name}: expected a diffusion model, got a text encoder. "
            "Quantize it with SVDQuant Quantize Text Encoder."
        )
    plan = _draft(source, precision, rank)
    refuse_idle(overrides, [job.name for job in plan.jobs])
    jobs = [override(job, overrides) for job in plan.jobs]
    if not centred:
        jobs = [replace(job, center=None, folds=()) for job in jobs]
    quantized = [job for job in jobs if job.precision != "plain"]
    if not quantized:
        raise ValueError(f"{source.path.name}: expected linears to quantize, got none that are large enough.")
    if plan.family != MODEL:
        refuse_forms(jobs)
        if mixes(jobs, plain=plan.family != flux.FAMILY.name):
            return plan.mixing(jobs)
    return replace(plan, jobs=tuple(quantized))


def _draft(source: SourceModel, precision: str, rank: int) -> Plan:
    """What a family makes of a model, before the user's wishes."""
    packed = partial(natural.write, packed=True)
    host = flux_names(source)
    if host:
        jobs, metadata = flux_jobs(host, precision, rank), flux_metadata(host)
        return Plan(flux.FAMILY.name, host, tuple(jobs), nunchaku.write, packed, metadata, stored_name)
    family, host = host_names(source)
    if family:
        joined, jobs = published_jobs(family, host, precision, rank)
        metadata, rename = family.published.metadata(host.shapes), partial(published_name, family)
        return Plan(family.name, joined, tuple(jobs), nunchaku.write, packed, metadata, rename)
    jobs = native_jobs(host, precision, rank)
    refuse_names(host, jobs)
    return Plan(MODEL, host, tuple(jobs), packed, packed, {})


def override(job: Job, overrides: tuple[tuple[str, str], ...]) -> Job:
    """The job with the precision of the last pattern that matches its name."""
    for pattern, precision in overrides:
        if precision not in (*GROUPS, "plain"):
            raise ValueError(f"{pattern}: expected int4, nvfp4, awq or plain, got {precision!r}.")
        if fnmatch.fnmatchcase(job.name, pattern):
            job = replace(job, precision=precision, rank=0 if precision == "awq" else job.rank)
    return job


def refuse_idle(overrides: tuple[tuple[str, str], ...], names: list[str]) -> None:
    """A pattern that matches nothing is a slip of the pen, and would cost hours to be noticed."""
    for pattern, _ in overrides:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"{pattern}: expected a pattern that matches some of the {len(names)} linears, such as {names[0]}, got "
                "one that matches none. * stands for any letters."
            )


def refuse_forms(jobs: list[Job]) -> None:
    """Forms that no file can hold: W4A4 modulations, whose rows lie in AWQ's order, and half a linear in 16 bits."""
    kept = {job.source for job in jobs if job.precision == "plain"}
    for job in jobs:
        if job.chunks and job.precision not in ("awq", "plain"):
            raise ValueError(f"{job.name}: expected awq or plain for a modulation, got {job.precision}.")
        if job.source in kept and job.precision != "plain":
            halves = [one.name for one in jobs if one.source == job.source and one.precision == "plain"]
            raise ValueError(
                f"{job.name}: expected plain, as of {halves[0]}, got {job.precision}: they are one linear of the "
                f"model ({job.source}), which stays in 16 bits as a whole. Name both, or neither."
            )


def mixes(jobs: list[Job], *, plain: bool) -> bool:
    """Whether the linears have forms that the published layout has no place for.

    plain   whether it has one for 16-bit linears, in this family
    """
    return any(
        (job.precision == "awq" and not job.chunks) or (job.precision == "plain" and not plain)
        for job in jobs
    )


def refuse_names(source: SourceModel, jobs: list[Job]) -> None:
    """A file under its host's names must not be taken for one in a published layout, which means other numbers."""
    quantized = {job.name for job in jobs}
    others = {name: None for name in source.shapes if name.rpartition(".")[0] not in quantized}
    family = resolve(Names(dict.fromkeys(quantized), others))
    if family not in (None, native.FAMILY):
        raise ValueError(
            f"{source.path.name}: expected all tensors of a {family.name} model and no others, got a variant that its "
            "published layout cannot hold."
        )


def native_jobs(source: SourceModel, precision: str, rank: int) -> list[Job]:
    """Every linear that pays, under the name it has."""
    jobs = []
    for key, shape in source.shapes.items():
        name = key.removesuffix(".weight")
        if key.endswith(".weight") and len(shape) == 2 and pays(name, shape, precision):
            jobs.append(Job(name, name, precision, min(rank, min(shape) // 16 * 16)))
    return jobs


def pays(name: str, shape: tuple[int, ...], precision: str) -> bool:
    """Whether four bits are worth it: a block's linear, wide enough, no embedder, norm or last layer."""
    inside = any(part.isdigit() for part in name.split("."))
    kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT)
    return inside and not kept and shape[1] % GROUPS[precision] == 0 and shape[0] * shape[1] >= SMALLEST
