"""A budget becomes a plan: measure, choose, and keep a table of what was chosen beside the file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...loaders.plan import Plan
from . import sensitivity
from .alone import alone
from .sensitivity import Limit, Measured, Option, Table
from .stream import Settings, check_statistics, check_target
from .task import Sample

MB = 2**20


@dataclass(frozen=True, eq=False)
class Decision:
    """What was chosen and why.

    plan      the plan with the chosen forms
    choice    every linear's form
    measured  what there was to choose from
    limit     what had to be kept
    """

    plan: Plan
    choice: Mapping[str, Option]
    measured: Table
    limit: Limit

    def as_text(self) -> str:
        """A line on the whole, and one for every linear."""
        kinds = Counter(option.precision for option in self.choice.values())
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        size = sum(option.nbytes for option in self.choice.values()) / MB
        error = 100 * sensitivity.overall_error(self.choice)
        first = f"{told} linears (plain: 16 bits), {size:.1f} MB, measured error {error:.2f} %"
        lines = [
            f"  {name:<44} {o.precision:6} r{o.rank:<4} {o.nbytes / MB:8.2f} MB {100 * o.error:7.2f} %"
            for name, o in self.choice.items()
        ]
        return "\n".join([first, *lines])

    def as_dict(self, reached: Mapping[str, float]) -> dict:
        """The same as data, with the errors that the finished linears have."""
        linears = {
            name: {
                **vars(option),
                "reached": reached.get(name),
                "forms": list(map(vars, self.measured[name])),
            }
            for name, option in self.choice.items()
        }
        measured = sensitivity.overall_error(self.choice)
        return {"limit": vars(self.limit), "measured_error": measured, "linears": linears}


def decide(
    plan: Plan,
    limit: Limit,
    formats: Sequence[str],
    target: Path,
    settings: Settings,
    *,
    statistics: Mapping[str, Sample] | None = None,
    progress: Measured | None = None,
) -> Decision:
    """Measure every form of every linear and choose among them.

    formats   of sensitivity.FORMATS
    target    the file to be written: measurements are kept beside it until it is, so that a stopped run goes on

    Raises ValueError for a limit that nothing keeps, a target that cannot be written, missing statistics.
    """
    check_target(target)
    check_statistics(plan.jobs, settings, statistics)
    with alone(target):
        found = sensitivity.measure(
            plan, formats, settings, statistics=statistics, kept=_measurements(target), progress=progress
        )
    choice = sensitivity.choose(plan, found, limit)
    made = sensitivity.chosen(plan, choice)
    made = replace(made, metadata={**made.metadata, "svdquant_limit": json.dumps(vars(limit))})
    return Decision(made, choice, found, limit)


def save(decision: Decision, target: Path, reached: Mapping[str, float]) -> Path:
    """Write the table beside the finished file, as NAME.choices.json; returns its path."""
    path = target.with_name(f"{target.stem}.choices.json")
    path.write_text(json.dumps(decision.as_dict(reached), indent=1) + "\n")
    _measurements(target).unlink(missing_ok=True)
    return path


def _measurements(target: Path) -> Path:
    return target.with_name(f".{target.name}.measured.json")
