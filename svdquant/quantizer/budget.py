"""Which form each linear takes: the smallest loss within a size, or the smallest size within a loss.

Every unit (a linear, or several that are decided together) has some forms, each with its bytes and its loss; losses
add up. Starting from the smallest forms, the step that repairs most per byte is taken first, along the lower convex
hull of each unit; what is left is then spent on whatever still fits. The exact answer is no more than one such step
better (Everett 1963: it is exact at every budget that the steps hit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """One way to store a unit.

    nbytes   in the file
    loss     what it spoils; losses of different units add up
    content  the caller's own
    """

    nbytes: int
    loss: float
    content: Any = None


Units = Sequence[Sequence[Form]]


def hull(forms: Sequence[Form]) -> list[Form]:
    """The forms on the lower convex hull, the smallest first: each step repairs less per byte than the one before."""
    kept: list[Form] = []
    for form in sorted(forms, key=lambda f: (f.nbytes, f.loss)):
        if kept and form.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], form):
            kept.pop()
        kept.append(form)
    return kept


def _gain(worse: Form, better: Form) -> float:
    """Loss repaired per byte."""
    return (worse.loss - better.loss) / (better.nbytes - worse.nbytes)


def steps(hulls: Sequence[Sequence[Form]]) -> list[tuple[int, Form]]:
    """(unit, its next form) for every step of every hull, those that repair most per byte first."""
    found = [
        (_gain(a, b), i, b) for i, line in enumerate(hulls) for a, b in zip(line, line[1:], strict=False)
    ]
    return [(i, form) for _, i, form in sorted(found, key=lambda step: -step[0])]


def within_size(units: Units, limit: int) -> list[Form]:
    """A form of every unit, the sum of bytes at most `limit`.

    Raises ValueError where even the smallest forms need more.
    """
    hulls = [hull(forms) for forms in units]
    chosen = [line[0] for line in hulls]
    free = limit - size(chosen)
    if free < 0:
        raise ValueError(f"size: expected at least {size(chosen)} bytes, got {limit}. Allow more.")
    for i, form in steps(hulls):
        more = form.nbytes - chosen[i].nbytes
        if more <= free:
            chosen[i], free = form, free - more
    while better := _best_exchange(units, chosen, free, less="loss", more="nbytes"):
        i, form = better
        chosen[i], free = form, free - (form.nbytes - chosen[i].nbytes)
    return chosen


def within_loss(units: Units, limit: float) -> list[Form]:
    """A form of every unit, the sum of losses at most `limit`.

    Raises ValueError where even the best forms lose more.
    """
    hulls = [hull(forms) for forms in units]
    chosen = [line[0] for line in hulls]
    for i, form in steps(hulls):
        if loss(chosen) <= limit:
            break
        chosen[i] = form
    if loss(chosen) > limit:
        raise ValueError(
            "error: expected a limit that some choice of forms keeps, got a smaller one. Allow 16 bits."
        )
    while smaller := _best_exchange(units, chosen, limit - loss(chosen), less="nbytes", more="loss"):
        i, form = smaller
        chosen[i] = form
    return chosen


def _best_exchange(
    units: Units, chosen: list[Form], free: float, *, less: str, more: str
) -> tuple[int, Form] | None:
    """The exchange that takes most off the field `less` and adds at most `free` to the field `more`."""
    fitting = [
        (getattr(chosen[i], less) - getattr(form, less), i, form)
        for i, forms in enumerate(units)
        for form in forms
        if getattr(form, more) - getattr(chosen[i], more) <= free
        and getattr(form, less) < getattr(chosen[i], less)
    ]
    return max(fitting, key=lambda found: found[0])[1:] if fitting else None


def size(forms: Sequence[Form]) -> int:
    """Bytes in all."""
    return sum(form.nbytes for form in forms)


def loss(forms: Sequence[Form]) -> float:
    """Loss in all."""
    return sum(form.loss for form in forms)
