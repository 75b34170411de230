"""The one timer: contenders take turns, so that whatever else the machine does hits all of them alike.

Each round runs every contender once, beginning with another one each time; medians and tenths over the rounds are
what is reported. A contender is called with a running number, to pick other data each time.

The clock is the wall's, or `time.process_time`: processor seconds, which on a machine that others use leave out the
time that it was theirs. Those of several threads add up, so it is meant for one.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

SAMPLE_SECONDS = (
    2e-3  # shorter calls are timed several at once: the clock and the interpreter take microseconds
)
FEWEST_ROUNDS = 7

Contender = Callable[[int], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds."""

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int

    def row(self) -> dict[str, object]:
        return {**vars(self)}


def measure(
    contenders: Mapping[str, Contender], *, seconds: float, clock: Clock = time.perf_counter
) -> list[Timing]:
    """Time contenders against each other for about so long in all, in the order they were given."""
    repeats = {name: _repeats(call, clock) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names, end, done = list(contenders), time.perf_counter() + seconds, 0
    while done < FEWEST_ROUNDS or time.perf_counter() < end:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_sample(contenders[name], repeats[name], done, clock))
        done += 1
    return [_summary(name, times) for name, times in samples.items()]


def _repeats(call: Contender, clock: Clock) -> int:
    """Warm up, and find how many calls make one sample."""
    call(0)
    return max(1, round(SAMPLE_SECONDS / _sample(call, 1, 1, clock)))


def _sample(call: Contender, repeats: int, number: int, clock: Clock) -> float:
    """Seconds of one call."""
    start = clock()
    for i in range(repeats):
        call(number * repeats + i)
    return (clock() - start) / repeats


def _summary(name: str, times: list[float]) -> Timing:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(name, 1e3 * statistics.median(times), 1e3 * tenths[0], 1e3 * tenths[-1], len(times))


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
