"""Make the pack importable as `svdquant_nodes` from a script, whatever its folder is called.

The pack's folder may hold a dash, and ComfyUI owns the absolute name `nodes`, so the root never goes on sys.path.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "svdquant_nodes"


def alias() -> str:
    """Register the pack under its fixed name, without running its `__init__`; returns the name."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    if NAME not in sys.modules:
        pack = types.ModuleType(NAME)
        pack.__path__ = [str(ROOT)]
        sys.modules[NAME] = pack
    return NAME
