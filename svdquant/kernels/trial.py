"""Try a GPU's kernels, in a process that may crash: `gpu.py` starts it, and reads one line of JSON a step.

{"trying": "mma_s8"}                    from here on, whatever happens is that spelling's fault
{"fault": "gemm_int4 is off by 3 ..."}  what is wrong with it
{"done": "mma_s8"}                      all were tried, this one last
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import torch

from . import gpu, ops, select, selftest


def main(arguments: Sequence[str]) -> None:
    """`arguments`: the GPU's number, then spellings not to try."""
    index, skipped = int(arguments[0]), arguments[1:]
    ops.declare()
    found, _ = gpu.load(index)
    if not select.to_try(found):
        raise SystemExit(found.missing)
    where = torch.device("cuda", index)
    torch.zeros(1, device=where)  # what is wrong with the card itself is no spelling's fault
    run(found, where, skipped)


def run(found: select.Device, where: torch.device, skipped: Collection[str]) -> None:
    """Try every spelling that a device could run, and say what comes of it."""
    for row in select.to_try(found):
        if row.name in skipped:
            continue
        _say(trying=row.name)
        fault = selftest.problem(Trial(found, row.name), where, row.ops, row.dtypes)
        if fault:
            _say(fault=str(fault))
        if where.type == "cuda":
            torch.cuda.synchronize(where)  # raises after an error that no later call survives
    _say(done="")


def _say(**word: str) -> None:
    print(json.dumps(word), flush=True)


class Trial(ops.OpSet):
    """The op set that insists on a spelling, on a device that `ops.device` does not know yet."""

    def __init__(self, found: select.Device, wanted: str) -> None:
        super().__init__(wanted)
        self.found = found

    def _choose(self, op: str, x: torch.Tensor, dtype: torch.dtype) -> str:
        name, tokens = str(dtype).removeprefix("torch."), select.about(op, x.shape[0])
        request = select.Request(op, name, tokens=tokens, wanted=self.wanted)
        return select.choose(self.found, request).spelling
