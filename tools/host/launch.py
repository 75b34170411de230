"""Start a ComfyUI tree's main.py: `python launch.py TREE [main.py's arguments]`.

Two things are done first, both so that an ordinary tree runs from ordinary PyPI packages:

* PyPI's torchvision is linked against CUDA. On a CPU build of torch its extension does not load, and the
  import stops at fake kernels for two operators that nobody declared. They are declared here, at the moment
  torchvision gets to those kernels: not earlier, because ComfyUI sets variables that torch reads on import.
* With SVDQUANT_STOP_WITH_STDIN set, the host ends when its standard input closes, so a host never outlives
  the test run that started it, however that run ends.
"""

from __future__ import annotations

import importlib.abc
import os
import runpy
import sys
import threading
from pathlib import Path

FAKE_KERNELS = ("torchvision._autograd_registrations", "torchvision._meta_registrations")
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators when its extension, tried before these modules, has not."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in FAKE_KERNELS:
            sys.meta_path.remove(self)
            declare_missing()


def declare_missing() -> None:
    """Declare each operator that torchvision's own extension did not bring."""
    import torch

    for operator in OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", SCHEMA)


def stop_with_stdin() -> None:
    """End this process when whoever started it closes the pipe, or dies."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(tree: str, *arguments: str) -> None:
    """Become ComfyUI: working folder, path and arguments as if main.py had been started in its own tree."""
    if os.environ.get("SVDQUANT_STOP_WITH_STDIN"):
        stop_with_stdin()
    sys.meta_path.insert(0, DeclareOperators())
    root = Path(tree).resolve()
    os.chdir(root)
    sys.path[0] = str(root)
    sys.argv = [str(root / "main.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
