"""Tests that run inside a ComfyUI process, next to its own classes; `tests/host/test_inside.py` starts them.

One process holds one ComfyUI, so these files are collected only where SVDQUANT_INSIDE_TREE names its tree.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TREE = os.environ.get("SVDQUANT_INSIDE_TREE")
collect_ignore_glob = [] if TREE else ["test_*.py"]

ROOT = Path(__file__).resolve().parents[2]


def _become_host() -> None:
    """Set the process up as main.py does: the tree first on the path, its arguments parsed, on the CPU."""
    sys.path.insert(0, str(ROOT / "tools" / "host"))
    from launch import DeclareOperators

    sys.path.pop(0)
    sys.meta_path.insert(0, DeclareOperators())
    sys.path.insert(0, TREE)
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401  the host's own, before ours can be asked for


if TREE:
    _become_host()


@pytest.fixture(autouse=True)
def inference_mode():
    """The server runs everything in it, loaders included."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def unload_after():
    """No test sees another one's loaded model."""
    yield
    import comfy.model_management

    comfy.model_management.unload_all_models()


@pytest.fixture(scope="session")
def twins():
    """The demo model with exact activations, and the 16-bit model it should then equal."""
    import torch

    from svdquant_nodes.tests.inside_host import twins

    with torch.inference_mode():
        return twins.make()


@pytest.fixture(scope="session")
def quantized():
    """The demo model as users load it."""
    import torch

    from svdquant_nodes.svdquant.adapters.load import load_model
    from svdquant_nodes.tests.inside_host.twins import DEMO_INT4

    with torch.inference_mode():
        return load_model(DEMO_INT4)
