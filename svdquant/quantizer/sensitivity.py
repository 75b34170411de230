"""What every form of every linear costs in bytes and in output error, measured before one is chosen.

One singular value decomposition gives the branches of all ranks. Each one's residual is rounded to the nearest codes
and the output error measured on held-out inputs, after a cheap smoothing search; without statistics it is the error of
the weight. Recipes end below these errors, by much the same factor everywhere, so that they rank the forms.

The squares of relative errors are added up, every linear alike. Weighing them by the energy of the linear's output
looks better founded and draws worse pictures (docs/log.md): residual streams and gates come after it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from ...loaders.plan import Plan
from ...loaders.source import Job
from ...loaders.writer import checkpoint_room
from ..core import awq
from ..core.weights import AWQ, INT4, NVFP4
from . import budget, recipes, smoothing
from .branch import strongest
from .jobs import round_weights, task_of
from .stream import Settings, key_of
from .task import Sample, Task, relative_error, start

RANKS = (0, 16, 32, 48, 64, 96, 128, 192, 256)
GROUPS = {"int4": INT4.group, "nvfp4": NVFP4.group, "awq": AWQ.group}
FORMATS = ("int4", "nvfp4", "awq", "plain")
NOTES_BYTES = 128  # of a linear in the header, with its error
SMOOTHINGS = 4  # points of the search: seven candidates

Measured = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Option:
    """One form of a linear.

    precision  int4 | nvfp4 | awq | plain (16 bits)
    rank       of its branch
    nbytes     in the file
    error      relative output error, see the module
    """

    precision: str
    rank: int
    nbytes: int
    error: float


@dataclass(frozen=True)
class Limit:
    """What the choice has to keep: one of the two.

    nbytes   of all tensors of the file
    error    of all linears together: the root mean square of their relative errors
    """

    nbytes: int | None = None
    error: float | None = None


Table = Mapping[str, Sequence[Option]]


def measure(
    plan: Plan,
    formats: Sequence[str],
    settings: Settings,
    *,
    statistics: Mapping[str, Sample] | None = None,
    kept: Path | None = None,
    progress: Measured | None = None,
) -> dict[str, Sequence[Option]]:
    """Every linear's forms, by its name in the file.

    formats   of FORMATS; modulations in Nunchaku's order have the choice of awq and plain only
    kept      a file that holds what was measured until all is, so that a stopped run goes on
    progress  called with (name, linears done, linears in all)
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(
            f"formats: expected some of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}."
        )
    key = json.dumps([key_of(plan, settings, statistics), sorted(formats)])
    found = _read(kept, key)
    for done, job in enumerate(plan.jobs, 1):
        if job.name not in found:
            found[job.name] = measure_linear(plan, job, formats, settings, statistics)
            if kept:
                _write(kept, key, found)
        if progress:
            progress(job.name, done, len(plan.jobs))
    return found


def _read(kept: Path | None, key: str) -> dict[str, Sequence[Option]]:
    if kept is None or not kept.is_file():
        return {}
    told = json.loads(kept.read_text())
    if told["key"] != key:
        return {}
    return {name: [Option(**one) for one in options] for name, options in told["linears"].items()}


def _write(kept: Path, key: str, found: Table) -> None:
    new = kept.with_name(f"{kept.name}.new")
    linears = {name: [asdict(one) for one in options] for name, options in found.items()}
    new.write_text(json.dumps({"key": key, "linears": linears}))
    new.replace(kept)


def measure_linear(
    plan: Plan, job: Job, formats: Sequence[str], settings: Settings, statistics: Mapping[str, Sample] | None
) -> list[Option]:
    """One linear's forms. ValueError where its width is a multiple of no format's group."""
    weight = plan.source.cut(job)[0].to(settings.device)
    n, k = weight.shape
    held = None
    if statistics is not None and job.reads in statistics:
        held = statistics[job.reads].held[:, slice(*job.columns)].to(settings.device).float()
    if job.chunks:
        formats = ("awq", *(form for form in formats if form == "plain"))
    options: list[Option] = []
    for form in dict.fromkeys(formats):
        if form == "plain":
            itemsize = plan.source.tensors[f"{job.source}.weight"].dtype.itemsize
            options.append(Option(form, 0, n * (k + 1) * itemsize, 0.0))
        elif k % GROUPS[form]:
            continue
        elif form == "awq":
            options.append(Option(form, 0, stored_bytes(form, n, k), weight_only_error(weight, held)))
        else:
            one = replace(job, precision=form, rank=min(max(RANKS), min(n, k) // 16 * 16))
            task = task_of(plan.source, one, statistics, seed=settings.seed, device=settings.device)
            options += [Option(form, r, stored_bytes(form, n, k, r), e) for r, e in branches(task).items()]
    if not options:
        raise ValueError(f"{job.name}: its {k} inputs are no multiple of a group of {formats}. Allow plain.")
    return options


def branches(task: Task) -> dict[int, float]:
    """Relative error of the nearest codes beside a branch of every rank up to the task's."""
    fit = start(task) if task.sample is None else smoothing.search(start(task), points=SMOOTHINGS)
    factor, up = strongest(fit.weight, task.rank, task.generator())
    fits = {r: fit.with_branch(factor[:r], up[:, :r]) for r in RANKS if r <= task.rank}
    return {r: relative_error(recipes.round_nearest(one, clipped=False)) for r, one in fits.items()}


def weight_only_error(weight: Tensor, held: Tensor | None) -> float:
    """Relative error of 4-bit weights on 16-bit inputs [H, K], or of the weight [N, K] itself."""
    near = round_weights(weight, None)
    missed = awq.dequantize_weight(near.codes, near.scales, near.zeros) - weight
    return (squared_norm(missed, held) / max(squared_norm(weight, held), 1e-30)) ** 0.5


def squared_norm(weight: Tensor, held: Tensor | None) -> float:
    """Mean of |W x|^2 over inputs [H, K], or |W|^2."""
    return weight.square().sum().item() if held is None else (held @ weight.T).square().sum(1).mean().item()


def stored_bytes(form: str, n: int, k: int, rank: int = 0) -> int:
    """What a 4-bit linear takes in the file, its bias included."""
    per_group = {"int4": 2, "nvfp4": 1, "awq": 4}[form]
    branch = 0 if form == "awq" else 2 * k + 2 * rank * (n + k) + 4
    return n * k // 2 + n * k // GROUPS[form] * per_group + branch + 2 * n


def choose(plan: Plan, measured: Table, limit: Limit) -> dict[str, Option]:
    """A form of every linear: the smallest error within a size, or the smallest size within an error.

    Linears cut from one source linear stay in 16 bits together or not at all. Raises ValueError for a limit that
    nothing keeps.
    """
    units = [list(_forms(names, measured)) for names in _together(plan.jobs)]
    if limit.nbytes is not None:
        around = sum(tensor.nbytes for tensor in plan.plain.values())
        around += checkpoint_room(measured, plan.source.shapes, plan.metadata) + NOTES_BYTES * len(measured)
        least = around + sum(min(form.nbytes for form in forms) for forms in units)
        if limit.nbytes < least:
            raise ValueError(
                f"budget: expected at least {least / 2**20:.2f} MB for the whole file, got "
                f"{limit.nbytes / 2**20:.2f} MB. Allow more."
            )
        found = budget.within_size(units, limit.nbytes - around)
    else:
        found = budget.within_loss(units, limit.error**2 * len(plan.jobs))
    picked = {name: option for form in found for name, option in form.content.items()}
    return {job.name: picked[job.name] for job in plan.jobs}


def _together(jobs: Sequence[Job]) -> Iterable[list[str]]:
    by_source: dict[str, list[str]] = {}
    for job in jobs:
        by_source.setdefault(job.source, []).append(job.name)
    return by_source.values()


def _forms(names: Sequence[str], measured: Table) -> Iterator[budget.Form]:
    for options in itertools.product(*(measured[name] for name in names)):
        if len({option.precision == "plain" for option in options}) == 1:
            size, loss = sum(o.nbytes for o in options), sum(o.error**2 for o in options)
            yield budget.Form(size, loss, dict(zip(names, options, strict=True)))


def chosen(plan: Plan, choice: Mapping[str, Option]) -> Plan:
    """The plan with these forms of its linears."""
    return plan.mixing(
        replace(job, precision=choice[job.name].precision, rank=choice[job.name].rank) for job in plan.jobs
    )


def overall_error(choice: Mapping[str, Option]) -> float:
    """The root mean square of relative errors."""
    return (sum(option.error**2 for option in choice.values()) / len(choice)) ** 0.5
