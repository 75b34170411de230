"""The GPU benchmark, tried without a GPU: every line of its Python but the graphs runs on tiny shapes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from svdquant_nodes.benchmarks import gpu
from svdquant_nodes.tools.pack import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_dry_run(tmp_path):
    command = ["bash", str(SCRIPT), "--dry"]
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


def test_what_a_graph_reads_lives_as_long_as_it(monkeypatch):
    """Or its memory is given back before the next capture, and a replay reads where nothing is."""
    replays, event = [], SimpleNamespace(record=int, synchronize=int, elapsed_time=lambda other: 2.0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", int)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    weight = torch.ones(3)
    there = weakref.ref(weight)
    sample = gpu.Captured(lambda i, weight=weight: weight * i, 2)
    del weight
    assert there() is not None and sample() == 2.0 and replays == [1]


def test_a_card_that_is_lost_costs_only_what_comes_after(monkeypatch, tmp_path):
    """And so do a mistake of ours and the end of the time."""
    bench = gpu.Bench("cpu", 1000.0)
    measured = []

    def measure(name, *_):
        if measured:
            raise RuntimeError("CUDA error: unspecified launch failure")
        measured.append(name)
        figures = dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "tflops", "speed_up"), 1.0)
        return [dict(shape=name, m=1, n=2, k=3, rank=0, count=38, name="cublas_bf16", error=None, **figures)]

    bench.measure = measure
    monkeypatch.setattr(gpu, "Bench", lambda *_: bench)
    to = tmp_path / "gpu.json"
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--dry", "--json", str(to), "--markdown", str(tmp_path / "gpu.md")]
    )
    with pytest.raises(SystemExit, match="ended early: CUDA error: unspecified launch failure"):
        gpu.main()
    assert [row["shape"] for row in json.loads(to.read_text())["rows"]] == measured == ["flux modulation"]
    assert "| flux modulation | 1 x 2 x 3 | 1.000 (1.00) |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("name", ["calls", "sizes"])
def test_the_selections_of_the_script_select_tests(name):
    """A word that pytest cannot read would end a step before it begins."""
    words = re.search(rf'^{name}="(.*)"', SCRIPT.read_text(), re.MULTILINE)[1]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-k", words]
    done = subprocess.run([*command, "tests/kernels/test_gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "any_number_of_tokens[int4-m=17-bf16]" in done.stdout
