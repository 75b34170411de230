"""One line for each thing the set-up does, with its time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator


class Steps:
    """Prints `  0:42  what is done ... 3.1 s`; a command that restarts in the venv keeps its clock."""

    _START = "SVDQUANT_STARTED"

    def __init__(self) -> None:
        self._start = float(os.environ.get(self._START) or time.time())

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Print `what` at once, its seconds when the block ends; a block that raises leaves `failed`."""
        start = time.perf_counter()
        self._write(f"{self._clock()}  {what} ...")
        try:
            yield
        except BaseException:
            self._write(" failed\n")
            raise
        self._write(f" {time.perf_counter() - start:.1f} s\n")

    def note(self, text: str) -> None:
        """Add a word to the line of the step under way."""
        self._write(f" {text}")

    def say(self, what: str) -> None:
        """A line that takes no time."""
        self._write(f"{self._clock()}  {what}\n")

    def environment(self) -> dict[str, str]:
        """Variables that let a restarted command keep this clock."""
        return {**os.environ, self._START: repr(self._start)}

    def _clock(self) -> str:
        seconds = int(time.time() - self._start)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)
