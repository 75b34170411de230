"""A whole checkpoint, one linear in memory at a time, finished linears kept in a folder until all are there.

The folder lies beside the target and is named after it. Whatever ends a run early, the same call goes on with the
first linear that is missing; another source, recipe or setting starts anew. The target appears when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...loaders import natural
from ...loaders.checkpoint import Lazy
from ...loaders.detect import open_checkpoint
from ...loaders.plan import Plan
from ...loaders.source import Job, SourceModel
from ...loaders.writer import DiskFull
from ..core.weights import GELU_SHIFT, LinearWeights
from . import recipes
from .alone import alone
from .jobs import task_of, weight_only
from .task import Sample, freeze, relative_error

Progress = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    recipe   of recipes.RECIPES
    seed     of everything random
    device   to compute on: weights and inputs of one linear move there, its finished tensors come back. Everything is
             computed in fp32, on inputs of 16 bits as the model sees them, so that devices differ in rounding only
    """

    recipe: str = "best"
    seed: int = 0
    device: str = "cpu"


def quantize(
    plan: Plan,
    target: Path,
    settings: Settings,
    *,
    statistics: Mapping[str, Sample] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Quantize every job and write the file.

    statistics  samples by source linear; None only for recipes that need none
    progress    called with (name, linears done, linears in all, its relative error or None)
    returns     relative error of every W4A4 linear, on held-out rows where there are statistics

    Raises ValueError for a target that cannot be written, a linear with NaN, missing statistics, a full disk, another
    run that makes the same file.
    """
    check_statistics(plan.jobs, settings, statistics)
    check_target(target)
    with full_disk_told(target), alone(target):
        work = open_folder(target, key_of(plan, settings, statistics))
        errors: dict[str, float] = {}
        for done, job in enumerate(plan.jobs, 1):
            part = work / f"{done:05}.safetensors"
            if not part.is_file():
                weights, error = make(plan.source, job, settings, statistics)
                note = {} if error is None else {"error": repr(error)}
                natural.write(part, {job.name: weights}, {}, note, packed=True)
                del weights
            error = open_checkpoint(part).metadata.get("error")
            if error is not None:
                errors[job.name] = float(error)
            if progress:
                progress(job.name, done, len(plan.jobs), errors.get(job.name))
        parts = {job.name: work / f"{i:05}.safetensors" for i, job in enumerate(plan.jobs, 1)}
        layers = Lazy(parts, lambda name: open_checkpoint(parts[name]).layers[name])
        plan.write(target, layers, plan.plain, {**plan.metadata, **notes(plan.jobs, settings, errors)})
        shutil.rmtree(work)
    return errors


def make(
    source: SourceModel, job: Job, settings: Settings, statistics: Mapping[str, Sample] | None
) -> tuple[LinearWeights, float | None]:
    """One linear and its relative error, None for weight-only ones."""
    if job.precision == "awq":
        return weight_only(source, job, statistics), None
    fit = recipes.run(
        settings.recipe, task_of(source, job, statistics, seed=settings.seed, device=settings.device)
    )
    made = freeze(fit)
    there = {name: t.cpu() for name, t in made.tensors().items()}
    return LinearWeights(made.spec, **there), relative_error(fit)


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
    """Refuse before hours of work what would fail at the first linear without a sample, or with NaN in it."""
    if settings.recipe not in recipes.RECIPES:
        recipes.run(settings.recipe, None)
    if settings.recipe == "instant":
        return
    missing = [job.reads for job in jobs if job.precision != "awq" and job.reads not in (statistics or {})]
    if missing:
        raise ValueError(
            f"recipe {settings.recipe}: expected statistics of every linear, got none of {missing[0]} and "
            f"{len(missing) - 1} more. Calibrate this model, or use the recipe instant."
        )
    for name in dict.fromkeys(job.reads for job in jobs if job.precision != "awq"):
        if not bool(torch.isfinite(statistics[name].mean).all()):
            raise ValueError(
                f"statistics of {name}: expected finite inputs, got NaN or infinity. The 16-bit model overflowed "
                "while it was sampled; calibrate again with it in bf16 or fp32."
            )


def key_of(plan: Plan, settings: Settings, statistics: Mapping[str, Sample] | None) -> str:
    """A text that changes with anything that changes the result."""
    path = plan.source.path
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    means = [] if not statistics else [float(s.mean.double().sum()) for s in statistics.values()]
    told = json.dumps([stamps, [asdict(job) for job in plan.jobs], asdict(settings), means])
    return hashlib.sha256(told.encode()).hexdigest()


def check_target(target: Path) -> None:
    """ValueError where no file of this name can be written."""
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{target.name}: expected a folder {parent}, got none. Make it first.")
    if target.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{target}: cannot be written. Name a file in a folder you may write to.")


def open_folder(target: Path, key: str) -> Path:
    """The folder of finished linears; emptied if it belongs to another job."""
    work = target.with_name(f".{target.name}.unfinished")
    stamp = work / "job.sha256"
    if work.is_dir() and (not stamp.is_file() or stamp.read_text() != key):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    stamp.write_text(key)
    return work


@contextlib.contextmanager
def full_disk_told(target: Path) -> Iterator[None]:
    """A full disk in the words that users see, wherever it is met."""
    try:
        yield
    except (OSError, DiskFull) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"{target.name}: the disk is full; finished linears are kept. Free space in "
            f"{target.absolute().parent} and run this again."
        ) from None
