"""The pack under one fixed name, the same seeds for every test, and a reason for every test that cannot run here.

`from svdquant_nodes.svdquant.core import int4` works in any test; the pack's own `__init__.py`, which needs a
ComfyUI, is not run. The root is off `sys.path`, where our `nodes/` would hide the host's `nodes.py`.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; see tools/host/server.py


def _name_the_pack() -> None:
    spec = importlib.util.spec_from_file_location("pack", ROOT / "tools" / "pack.py")
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    pack.alias()


_name_the_pack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder, skip with the reason, and keep together what shares something costly."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(_group(item)))
        for folder in ("host", "ui"):
            if item.path.is_relative_to(ROOT / "tests" / folder):
                item.add_marker(folder)
    reasons = {"gpu": _no_gpu, "host": _no_host, "ui": _no_browser}
    for marker, missing in reasons.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing() if marked else None
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded: the counts of the suites that run inside a ComfyUI."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


def _group(item: pytest.Item) -> str:
    """Tests of one group run in one worker, one after the other: those of a running ComfyUI, else those of a file."""
    host = getattr(getattr(item, "callspec", None), "params", {}).get("host")
    return f"comfyui-{host.version}" if host else str(item.path)


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _no_host() -> str | None:
    from svdquant_nodes.tests.host_trees import host_trees

    return None if host_trees() else "no ComfyUI tree: ./tools/test sets two up"


def _no_browser() -> str | None:
    from svdquant_nodes.tools.host.browser import find_browser

    found = find_browser()
    return found if isinstance(found, str) else _no_host()


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
