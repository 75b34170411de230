"""What the environment says: all of the pack's variables that concern kernels are read here.

SVDQUANT_KERNELS     auto           `off` never builds or loads, reference ops run; or the name of a spelling
SVDQUANT_CACHE_DIR   user's cache   where libraries are kept
SVDQUANT_VERBOSE     0              1 shows the compiler's output
CXX                  g++ | cl       the C++ compiler (torch's own variable)
CUDA_HOME            searched       the CUDA toolkit (torch's own variable)
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the environment says."""

    kernels: str
    build: str
    cache: Path
    verbose: bool


@cache
def settings() -> Settings:
    return Settings(
        kernels=os.environ.get("SVDQUANT_KERNELS", "").strip().lower() or "auto",
        build=os.environ.get("SVDQUANT_BUILD", "").strip().lower() or "auto",
        cache=Path(os.environ.get("SVDQUANT_CACHE_DIR") or _user_cache()),
        verbose=os.environ.get("SVDQUANT_VERBOSE", "") not in ("", "0"),
    )


def _user_cache() -> Path:
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "svdquant-nodes"
