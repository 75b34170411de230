"""Visual Studio's C++ compiler on Windows, found without its command prompt.

Its compiler works only among some dozen variables that a batch file sets. Users start ComfyUI without them; torch's
compiler driver needs them. So the batch file is run, and what it set is read back.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

# at this place since 2017, whatever the edition
_INSTALLER = ("Microsoft Visual Studio", "Installer", "vswhere.exe")
_VARIABLES = ("VC", "Auxiliary", "Build", "vcvars64.bat")
_NEWEST_WITH_C = "-latest -products * -requires Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
_PLACE = "-property installationPath -utf8"
SECONDS = 120  # the batch file takes a few


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment with what the newest Visual Studio's command prompt would add; as it is where there is none.

    environment  as os.environ has it on Windows: names in capitals
    """
    batch = _batch_file(environment)
    said = _output(f'cmd /s /c ""{batch}" >nul && set"', environment) if batch else ""
    pairs = (line.split("=", 1) for line in said.splitlines() if "=" in line and not line.startswith("="))
    return {**environment, **{name.upper(): value for name, value in pairs}}


def _batch_file(environment: Mapping[str, str]) -> Path | None:
    finder = Path(environment.get("PROGRAMFILES(X86)", ""), *_INSTALLER)
    if not finder.is_file():
        return None
    home = _output([str(finder), *_NEWEST_WITH_C.split(), *_PLACE.split()], environment).strip()
    batch = Path(home, *_VARIABLES)
    return batch if home and batch.is_file() else None


def _output(command: str | list[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
