"""What a node asks of its files before the graph runs, and how it notices that one was replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from ..svdquant.adapters import folders

Stamp = tuple[Path, int, int]


def checked(kind: str, *names: str | None, check: Callable[[Path], object] | None = None) -> bool | str:
    """The answer of `validate_inputs`: True, or why there is no such file of this kind, or why `check` refuses it.

    The host then tells it at once, on the node, and runs nothing; it also leaves the list of files to this check. A
    name that is missing or comes from a link is None here: the first is the host's to tell, the second the node's.
    """
    try:
        for name in names:
            if name is not None:
                path = folders.find(kind, name)
                if check:
                    _passed(check, stamp(path))
    except ValueError as reason:
        return str(reason)
    return True


def fingerprint(kind: str, *values: object) -> list[str]:
    """The answer of `fingerprint_inputs`: it changes when a file behind one of the names is replaced.

    values   of the node's inputs, whatever they are; those that name no file count nothing

    The host compares it, and saves it with each picture: plain text, and no path of this machine.
    """
    stamps = []
    for name in _texts(values):
        try:
            _, size, changed = stamp(folders.find(kind, name))
            stamps.append(f"{size} {changed}")
        except (ValueError, OSError):
            continue
    return stamps


def stamp(path: Path) -> Stamp:
    """What tells a file from another that took its name."""
    told = path.stat()
    return path, told.st_size, told.st_mtime_ns


@lru_cache(maxsize=64)
def _passed(check: Callable[[Path], object], file: Stamp) -> None:
    """Read a header once, and not each time that a graph is queued; a refusal is not remembered."""
    check(file[0])


def _texts(values: Iterable[object]) -> Iterable[str]:
    for value in values:
        if isinstance(value, dict):
            yield from _texts(value.values())
        elif isinstance(value, str):
            yield value
