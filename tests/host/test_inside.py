"""Run `tests/inside_host` in a process of each ComfyUI; what it printed follows a failure.

A ComfyUI reads its arguments and claims the name `nodes` once per process, so two versions cannot share one.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from svdquant_nodes.tools.pack import ROOT

SUITE = ROOT / "tests" / "inside_host"


@pytest.mark.timeout(1500)
def test_inside(host, record_property):
    environment = {**os.environ, "SVDQUANT_INSIDE_TREE": str(host.tree), "OMP_NUM_THREADS": "1"}
    command = [str(host.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", summary).group(1)) >= 60, "some files were not collected"
    record_property(f"inside ComfyUI {host.version}", summary)
