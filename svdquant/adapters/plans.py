"""From a 16-bit model to the list of linears to write: FLUX.1 in Nunchaku's layout, any other under its own names.

The family tables say how stored linears become the host's; a plan walks them the other way. Nothing here needs a
ComfyUI.
"""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from functools import partial

from ...loaders import natural, nunchaku
from ...loaders.plan import Plan
from ...loaders.source import Job, SourceModel
from ..core.weights import AWQ, INT4, NVFP4
from .plan_flux import flux_jobs, flux_metadata, flux_names, stored_name

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
    "*time*",
    "out.*",
)
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

    Raises ValueError for settings that no file can hold, or a model without linears worth quantizing.
    """
    if precision not in ("int4", "nvfp4"):
        raise ValueError(f"precision: expected int4 or nvfp4, got {precision!r}.")
    if not 0 <= rank <= 256 or rank % 16:
        raise ValueError(f"rank: expected a multiple of 16 up to 256, got {rank}.")
    host = flux_names(source)
    family, source = ("FLUX.1", host) if host else ("model", source)
    jobs = (flux_jobs if host else native_jobs)(source, precision, rank)
    jobs = [override(job, overrides) for job in jobs]
    if host:
        refuse_plain(jobs)
    jobs = [job for job in jobs if job.precision != "plain"]
    if not jobs:
        raise ValueError(f"{source.path.name}: expected linears to quantize, got none that are large enough.")
    if not centred:
        jobs = [replace(job, center=None, folds=()) for job in jobs]
    packed = partial(natural.write, packed=True)
    if host:
        return Plan(family, source, tuple(jobs), nunchaku.write, packed, flux_metadata(source), stored_name)
    return Plan(family, source, tuple(jobs), packed, packed, {})


def override(job: Job, overrides: tuple[tuple[str, str], ...]) -> Job:
    """The job with the precision of the last pattern that matches its name."""
    for pattern, precision in overrides:
        if precision not in (*GROUPS, "plain"):
            raise ValueError(f"{pattern}: expected int4, nvfp4, awq or plain, got {precision!r}.")
        if fnmatch.fnmatchcase(job.name, pattern):
            job = replace(job, precision=precision, rank=0 if precision == "awq" else job.rank)
    return job


def refuse_plain(jobs: list[Job]) -> None:
    """FLUX files in Nunchaku's layout have no place for a 16-bit linear inside a block."""
    for job in jobs:
        if job.precision == "plain" or (job.precision == "awq") != bool(job.chunks):
            raise ValueError(
                f"{job.name}: expected int4 or nvfp4 (awq for modulations), got {job.precision}: a FLUX file in "
                "Nunchaku's layout has no other form for it."
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
