"""The folder where compiled kernels are kept, which cannot be left broken.

A file's name holds a hash of everything it was made from, so a file is either right or not there. It is made in a
private folder beside its place and moved to its name in one step: a killed build leaves a folder, swept a day later;
two builds at once both succeed; there is no lock.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("svdquant-nodes")

PREFIX = "build-"
DAY_SECONDS = 24 * 3600


class Unavailable(Exception):
    """Why there are no kernels, and what to do about it: half a sentence and a whole one."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def make(path: Path, name: str, build: Callable[[Path], Path]) -> None:
    """Have a file built in a private folder, then move it to its name.

    name    of the kernels, for the log
    build   private folder -> the file in it
    """
    start = time.perf_counter()
    log.info("SVDQuant: compiling the %s kernels, once for this machine", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path.parent))
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        build(folder).replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("SVDQuant: compiled the %s kernels in %.1f s: %s", name, time.perf_counter() - start, path)


def _unwritable(folder: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"{folder} cannot be written ({error.strerror or error})",
        "Make room or set SVDQUANT_CACHE_DIR to a folder of yours, then restart.",
    )


def _sweep(folder: Path) -> None:
    """Remove what killed builds left behind more than a day ago."""
    for leftover in folder.glob(f"{PREFIX}*"):
        if time.time() - leftover.stat().st_mtime > DAY_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
