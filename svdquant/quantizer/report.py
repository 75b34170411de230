"""What a quantization came to, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path


def summary(target: Path, errors: Mapping[str, float], seconds: float, *, measured: bool) -> str:
    """Size, time, mean and worst error.

    measured   errors are of outputs on held-out tokens, not of weights
    """
    first = f"{target.name}: {target.stat().st_size / 2**20:.1f} MB in {seconds:.1f} s"
    if not errors:
        return first
    what = "outputs on held-out tokens" if measured else "weights"
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    told = ", ".join(f"{name} {100 * errors[name]:.1f} %" for name in worst)
    return f"{first}\nmean error of {what} {decibels(errors):.2f} dB; worst: {told}"


def as_text(target: Path, errors: Mapping[str, float], seconds: float, *, measured: bool) -> str:
    """The summary, and one line for every linear."""
    lines = [f"  {name:<44} {100 * error:6.2f} %" for name, error in errors.items()]
    return "\n".join([summary(target, errors, seconds, measured=measured), *lines])


def decibels(errors: Mapping[str, float]) -> float:
    """Mean of -20 log10(error)."""
    return sum(-20 * math.log10(max(error, 1e-9)) for error in errors.values()) / len(errors)
