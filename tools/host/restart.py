"""Go on in another Python: a command starts in the system's and works in the virtual environment's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from .steps import Steps

_HERE = "SVDQUANT_RUNS_IN"


def restart_in(python: Path, steps: Steps) -> None:
    """Start this command again under `python`, with the same arguments and clock, unless it runs there."""
    if os.environ.get(_HERE) != str(python):
        become([python, *sys.argv], {**steps.environment(), _HERE: str(python)})


def become(command: list[str | Path], environment: dict[str, str]) -> NoReturn:
    """Replace this process by `command`; its exit code is ours."""
    words = [str(word) for word in command]
    sys.stdout.flush()
    if os.name == "nt":  # exec returns to the shell at once there
        sys.exit(subprocess.call(words, env=environment))
    os.execve(words[0], words, environment)
