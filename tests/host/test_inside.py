"""Run `tests/inside_host` in a process of each ComfyUI; what it printed follows a failure.

A ComfyUI reads its arguments and claims the name `nodes` once per process, so two versions cannot share one.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "tests" / "inside_host"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(path.name for path in SUITE.glob("test_*.py")))
def test_inside(host, name, record_property):
    environment = {**os.environ, "SVDQUANT_INSIDE_TREE": str(host.tree), "OMP_NUM_THREADS": "1"}
    command = [str(host.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE / name)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    record_property("passed", passed)
    print(f"{name}: {passed} passed inside ComfyUI {host.version}")
