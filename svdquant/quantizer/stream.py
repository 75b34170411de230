"""A whole checkpoint, one linear in memory at a time, finished linears kept in a folder until all are there.

The folder lies beside the target and is named after it. Whatever ends a run early, the same call goes on with the
first linear that is missing; another source, recipe or setting starts anew. The target appears when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ...loaders import natural
from ...loaders.checkpoint import Lazy
from ...loaders.detect import open_checkpoint
from ...loaders.source import Job, SourceModel
from ..core import awq
from ..core.weights import AWQ, GELU_SHIFT, INT4, INT4_UNSIGNED, NVFP4, LinearWeights, QuantSpec
from . import recipes
from .task import Sample, T, Task, freeze, relative_error

Progress = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    recipe   of recipes.RECIPES
    seed     of everything random
    device   to compute on
    """

    recipe: str = "best"
    seed: int = 0
    device: str = "cpu"


def quantize(
    source: SourceModel,
    jobs: Sequence[Job],
    target: Path,
    settings: Settings,
    *,
    statistics: Mapping[str, Sample] | None = None,
    plain: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dialect: ModuleType,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Quantize every job and write the file.

    statistics  samples by source linear; None only for recipes that need none
    plain       the other tensors
    dialect     the module of loaders/ that writes
    progress    called with (name, linears done, linears in all, its relative error or None)
    returns     relative error of every W4A4 linear, on held-out rows where there are statistics

    Raises ValueError for a target that cannot be written, a linear with NaN, missing statistics, a full disk.
    """
    check_statistics(jobs, settings, statistics)
    work = open_folder(target, key_of(source, jobs, settings, statistics))
    errors: dict[str, float] = {}
    for done, job in enumerate(jobs, 1):
        part = work / f"{done:05}.safetensors"
        if not part.is_file():
            weights, error = make(source, job, settings, statistics)
            note = {} if error is None else {"error": repr(error)}
            natural.write(part, {job.name: weights}, {}, note)
            del weights
        error = open_checkpoint(part).metadata.get("error")
        if error is not None:
            errors[job.name] = float(error)
        if progress:
            progress(job.name, done, len(jobs), errors.get(job.name))
    parts = {job.name: work / f"{i:05}.safetensors" for i, job in enumerate(jobs, 1)}
    layers = Lazy(parts, lambda name: open_checkpoint(parts[name]).layers[name])
    dialect.write(target, layers, plain, {**metadata, **notes(jobs, settings, errors)})
    shutil.rmtree(work)
    return errors


def make(
    source: SourceModel, job: Job, settings: Settings, statistics: Mapping[str, Sample] | None
) -> tuple[LinearWeights, float | None]:
    """One linear and its relative error, None for weight-only ones."""
    weight, bias = source.cut(job)
    bias = fold(bias, job, statistics)
    try:
        if job.precision == "awq":
            return weight_only(weight, bias, job.chunks), None
        sample = None if statistics is None or job.source not in statistics else statistics[job.source]
        task = Task(
            weight.to(settings.device),
            None if bias is None else bias.to(settings.device),
            spec_of(job),
            job.rank,
            None if sample is None else sample.columns(slice(*job.columns)).to(settings.device),
            center_of(job, statistics, settings.device),
            settings.seed,
        )
    except ValueError as error:
        raise ValueError(f"{source.path.name}: {job.source}: {error}") from None
    fit = recipes.run(settings.recipe, task)
    made = freeze(fit)
    return LinearWeights(made.spec, **{name: t.cpu() for name, t in made.tensors().items()}), relative_error(
        fit
    )


def spec_of(job: Job) -> QuantSpec:
    """Format and group of a W4A4 job."""
    if job.precision == "nvfp4":
        return NVFP4
    return INT4_UNSIGNED if job.after_gelu else INT4


def center_of(job: Job, statistics: Mapping[str, Sample] | None, device: str) -> Tensor | None:
    """The mean that other biases take out of the job's input, [K], or None."""
    if job.center is None or statistics is None:
        return None
    return statistics[job.center].columns(slice(*job.columns)).mean.float().to(device)


def fold(bias: Tensor | None, job: Job, statistics: Mapping[str, Sample] | None) -> Tensor | None:
    """The bias less the means it takes out for later linears."""
    if not job.folds or statistics is None or bias is None:
        return bias
    whole = torch.zeros(max(job.rows[0] + len(bias), *(f.rows[1] or 0 for f in job.folds)))
    for one in job.folds:
        whole[slice(*one.rows)] += statistics[one.input].mean[slice(*one.columns)].float()
    return bias - whole[job.rows[0] : job.rows[0] + len(bias)]


def weight_only(weight: Tensor, bias: Tensor | None, chunks: int) -> LinearWeights:
    """A linear in W4A16; a modulation's rows are interleaved and its scale rows get a 1 added (Nunchaku layout)."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: expected finite numbers, got NaN or infinity. The source file is damaged.")
    if chunks and bias is not None:
        bias = bias.to(T).unflatten(0, (chunks, -1)).clone()
        bias[1::3] += 1
        bias = bias.flatten()
    if chunks:
        weight, bias = (None if t is None else interleave(t, chunks) for t in (weight, bias))
    codes, scales, zeros = awq.quantize_weight(weight, T)
    return LinearWeights(AWQ, codes, scales, zeros=zeros, bias=None if bias is None else bias.to(T))


def interleave(x: Tensor, chunks: int) -> Tensor:
    """Row s*d + j becomes row j*chunks + s: [N, ...] -> [N, ...]."""
    return x.unflatten(0, (chunks, -1)).transpose(0, 1).flatten(0, 1).contiguous()


def notes(jobs: Sequence[Job], settings: Settings, errors: Mapping[str, float]) -> dict[str, str]:
    """What the file's header says of its making."""
    made = {
        "recipe": settings.recipe,
        "seed": settings.seed,
        "centred": any(job.center for job in jobs),
        "act_shift": GELU_SHIFT if any(job.after_gelu for job in jobs) else 0.0,
        "relative_error": {name: round(error, 5) for name, error in errors.items()},
    }
    return {"svdquant": json.dumps(made)}


def check_statistics(
    jobs: Sequence[Job], settings: Settings, statistics: Mapping[str, Sample] | None
) -> None:
    """Refuse before hours of work what would fail at the first linear without a sample."""
    if settings.recipe not in recipes.RECIPES:
        recipes.run(settings.recipe, None)
    if settings.recipe == "instant":
        return
    missing = [job.source for job in jobs if job.precision != "awq" and job.source not in (statistics or {})]
    if missing:
        raise ValueError(
            f"recipe {settings.recipe}: expected statistics of every linear, got none of {missing[0]} and "
            f"{len(missing) - 1} more. Calibrate this model, or use the recipe instant."
        )


def key_of(source: SourceModel, jobs: Sequence[Job], settings: Settings, statistics: Mapping | None) -> str:
    """A text that changes with anything that changes the result."""
    files = [source.path] if source.path.is_file() else sorted(source.path.rglob("*.safetensors"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    means = [] if not statistics else [float(s.mean.double().sum()) for s in statistics.values()]
    told = json.dumps([stamps, [asdict(job) for job in jobs], asdict(settings), means])
    return hashlib.sha256(told.encode()).hexdigest()


def open_folder(target: Path, key: str) -> Path:
    """The folder of finished linears; emptied if it belongs to another job. ValueError where none can be written."""
    parent, work = target.absolute().parent, target.with_name(f".{target.name}.unfinished")
    if not parent.is_dir():
        raise ValueError(f"{target.name}: expected a folder {parent}, got none. Make it first.")
    if target.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{target}: cannot be written. Name a file in a folder you may write to.")
    stamp = work / "job.sha256"
    if work.is_dir() and (not stamp.is_file() or stamp.read_text() != key):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    stamp.write_text(key)
    return work
