"""Run as a program by test_server.py: import the pack as a ComfyUI does, and say in JSON what that took.

python import_pack.py TREE
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = sys.argv[1]

sys.path.insert(0, str(ROOT / "tools" / "host"))
from launch import DeclareOperators  # noqa: E402

sys.path[:2] = [TREE]
sys.meta_path.insert(0, DeclareOperators())
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy_api.latest  # noqa: E402, F401
import nodes  # noqa: E402, F401  the host has imported both before any pack
import torch  # noqa: E402

# A full collection that happens to fall into our import walks the host's half a million objects for 0.2 s: with them
# set aside, only what the pack itself makes is counted.
gc.collect()
gc.freeze()

# Processor time, not the clock's: other programs must not decide a test. One thread imports, so it is an upper bound.
start = time.process_time()
spec = importlib.util.spec_from_file_location(
    "pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "cuda": torch.cuda.is_initialized()}))
