"""One run at a time for one file: two that share a folder of finished linears would mix theirs."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Keep other runs from making `target` meanwhile; the system lets go of it however this process ends.

    Raises ValueError where another run is making it. Folders whose system knows no locks go without.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = _held(path)
    if lock is None:
        raise ValueError(
            f"{target.name}: expected no other run that makes this file, got one at work. Wait for it, or name "
            "another file."
        )
    try:
        yield
    finally:
        if not fcntl:  # Windows removes no open file
            lock.close()
        with contextlib.suppress(OSError):
            path.unlink()
        lock.close()


def _held(path: Path) -> BinaryIO | None:
    """The open lock file, or None where another run holds it."""
    while True:
        lock = path.open("ab")
        try:
            _take(lock)
        except OSError as error:
            if error.errno in TAKEN:
                lock.close()
                return None
        # A run that has just ended may have removed the file between our two steps.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def _take(lock: BinaryIO) -> None:
    if fcntl:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        lock.seek(0)
        msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
