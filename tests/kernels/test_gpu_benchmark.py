"""The GPU benchmark, tried without a GPU: every line of its Python but the graphs runs on tiny shapes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from svdquant_nodes.tools.pack import ROOT


@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_dry_run(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {"device", "torch", "commit"} <= report["machine"].keys() and report["attention_ms"] > 0
    for shape in ("flux modulation", "flux single out", "sdxl fc2"):
        rows = {row["name"]: row for row in report["rows"] if row["shape"] == shape}
        ours = [row for name, row in rows.items() if name.startswith("svdquant_")]
        assert ours and rows["cublas_bf16"]["error"] < 0.01
        assert all(row["error"] < 0.2 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in ours)
    sums = {step["name"]: step for step in report["steps"] if step["rank"] == 32}
    out, modulation = (
        next(r for r in report["rows"] if (r["shape"], r["name"]) == (shape, "cublas_bf16"))
        for shape in ("flux single out", "flux modulation")
    )
    assert sums["cublas_bf16"]["without"] == []
    assert sums["cublas_bf16"]["milliseconds"] == pytest.approx(
        38 * (out["median_ms"] + modulation["median_ms"])
    )
    assert "| 32 | flux single out | cublas_bf16 |" in (tmp_path / "gpu.md").read_text()
