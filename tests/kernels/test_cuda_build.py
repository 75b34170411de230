"""The CUDA library as a user's machine makes it: built by torch's driver and nvcc, loaded, registered. Needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from svdquant_nodes.svdquant.kernels import jit
from svdquant_nodes.tests.kernels.test_jit import environment
from svdquant_nodes.tools.pack import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        torch.version.cuda is None, reason="this torch has no CUDA: nothing to link the library with"
    ),
    pytest.mark.skipif(jit.cuda_home() is None, reason="no CUDA toolkit: the library cannot be compiled"),
]

LOAD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import pack; pack.alias()
import torch
from svdquant_nodes.svdquant.kernels import jit, ops
ops.declare()
start = time.perf_counter()
missing = jit.load(jit.cuda_target(*map(tuple, json.loads(sys.argv[2]))))
seconds = time.perf_counter() - start
here = torch._C._dispatch_has_kernel_for_dispatch_key
names = [schema.partition("(")[0] for schema in ops.SCHEMAS]
registered = {name: here(f"svdquant::{name}", "CUDA") for name in names}
print(json.dumps(dict(missing=missing, seconds=seconds, ops=registered)))
"""
MACHINES = {"one-gpu": [(8, 6)], "oldest-beside-newest": [(7, 5), (12, 0)]}


@pytest.mark.parametrize("capabilities", MACHINES.values(), ids=MACHINES)
def test_builds_loads_and_registers_every_op(tmp_path, capabilities):
    command = [sys.executable, "-c", LOAD, str(ROOT / "tools"), json.dumps(capabilities)]
    loaded = []
    for _ in range(2):  # compiled, then found
        done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded.append(json.loads(done.stdout.splitlines()[-1]))
    for said in loaded:
        assert said["missing"] is None and all(said["ops"].values()), said
    assert loaded[1]["seconds"] < 1 and len(list(tmp_path.iterdir())) == 1
