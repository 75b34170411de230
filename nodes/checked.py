"""What a node asks of its files before the graph runs."""

from __future__ import annotations

from collections.abc import Callable


def checked(check: Callable[[str], object], *names: str | None) -> bool | str:
    """The answer of `validate_inputs`: True, or why `check` refuses one of the names.

    The host then tells it at once, on the node, and runs nothing; it also leaves the list of files to this check. A
    name that is missing or comes from a link is None here: the first is the host's to tell, the second the node's.
    """
    try:
        for name in names:
            if name is not None:
                check(name)
    except ValueError as reason:
        return str(reason)
    return True
