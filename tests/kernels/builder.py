"""Run as a program by test_jit.py: build the sources of a folder twice over, and say in JSON what came of it."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import pack

pack.alias()

from svdquant_nodes.svdquant.kernels import jit  # noqa: E402

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
jit.CSRC = Path(sys.argv[1])
start = time.perf_counter()
target = jit.cpu_target()
missing = jit.load(target)
seconds = time.perf_counter() - start
said = dict(missing=missing, again=jit.load(target), seconds=seconds, path=str(jit.library_path(target)))
print(json.dumps(said))
