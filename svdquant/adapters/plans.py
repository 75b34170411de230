"""From a 16-bit model to the list of linears to write.

Families that are published in Nunchaku's layout get it; any other model keeps its host's names. The family tables say
how stored linears become the host's; a plan walks them the other way. Nothing here needs a ComfyUI.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import replace
from functools import partial

from ...loaders import natural, nunchaku
from ...loaders.detect import TEXT_ENCODER
from ...loaders.plan import Plan
from ...loaders.source import Job, SourceModel
from ..core.weights import AWQ, INT4, NVFP4
from .families import flux, native, resolve
from .family import Names
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
    overrides  (pattern of file names, int4 | nvfp4 | awq | plain), the last that matches wins

    Raises ValueError for settings that no file can hold, a text encoder, or a model without linears worth quantizing.
    """
    if precision not in ("int4", "nvfp4"):
        raise ValueError(f"precision: expected int4 or nvfp4, got {precision!r}.")
    if not 0 <= rank <= 256 or rank % 16:
        raise ValueError(f"rank: expected a multiple of 16 up to 256, got {rank}.")
    if any(re.match(TEXT_ENCODER, name) for name in source.shapes):
        raise ValueError(
            f"{source.path.name}: expected a diffusion model, got a text encoder. A T5-XXL is quantized with SVDQuant "
            "Quantize Text Encoder; others stay in 16 bits or fp8."
        )
    plan = _draft(source, precision, rank)
    jobs = [override(job, overrides) for job in plan.jobs]
    if plan.family != MODEL:
        refuse_forms(jobs, plain=plan.family != flux.FAMILY.name)
    jobs = [job for job in jobs if job.precision != "plain"]
    if not jobs:
        raise ValueError(f"{source.path.name}: expected linears to quantize, got none that are large enough.")
    if not centred:
        jobs = [replace(job, center=None, folds=()) for job in jobs]
    return replace(plan, jobs=tuple(jobs))


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


def refuse_forms(jobs: list[Job], *, plain: bool) -> None:
    """Published layouts have one form for a linear; for some families 16 bits is another, which we can read."""
    for job in jobs:
        wrong = not plain if job.precision == "plain" else (job.precision == "awq") != bool(job.chunks)
        if wrong:
            raise ValueError(
                f"{job.name}: expected int4 or nvfp4 (awq for modulations), got {job.precision}: a file in "
                "Nunchaku's layout has no other form for it."
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
