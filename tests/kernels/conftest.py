from __future__ import annotations

import functools
import platform
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from svdquant_nodes.svdquant.core.weights import LinearWeights
from svdquant_nodes.svdquant.kernels import gpu, ops, select


class Insistent:
    """An op set of one row of select's table: what the row has no op for is skipped, and not run by another."""

    def __init__(self, row: select.Spelling) -> None:
        self.row, self.ops = row, ops.OpSet(row.name)

    def __getattr__(self, op: str):
        if op not in self.row.ops:
            pytest.skip(f"{self.row.name} has no {op}")
        return getattr(self.ops, op)


@dataclass(frozen=True)
class Spelled:
    """One spelling to judge: an op set that insists on it, and where its tensors must be."""

    ops: Insistent
    device: torch.device

    @property
    def tolerance(self) -> str:
        """Of a product with its branch, which a GPU sums in 16-bit halves."""
        return "fp32_sum" if self.device.type == "cpu" else "split_branch"

    def here(self, t: Tensor) -> Tensor:
        return t.to(self.device)

    def weights(self, w: LinearWeights) -> LinearWeights:
        return replace(w, **{name: self.here(t) for name, t in w.tensors().items()})


ARM = platform.machine().lower() in ("aarch64", "arm64")
FOREIGN = ("avx512", "avx2") if ARM else ("neon",)  # not even compiled here


def _rows() -> list:
    """Every spelling that is compiled here; a GPU's are marked, and skipped with a reason by tests/conftest.py."""
    built = [row for row in select.SPELLINGS if row.name not in FOREIGN]
    return [
        pytest.param(row, id=row.name, marks=[pytest.mark.gpu] if row.device == "cuda" else [])
        for row in built
    ]


@functools.cache
def trusted(kind: str) -> select.Device:
    """A device with its kernels; a GPU's whatever the self-test says, as they are what is to be tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "trusted", lambda found, *_: found)
        for index in range(torch.cuda.device_count() if kind == "cuda" else 0):
            ops.device(kind, index)
        return ops.device(kind)


@pytest.fixture(params=_rows())
def spelled(request: pytest.FixtureRequest) -> Spelled:
    row = request.param
    found = trusted(row.device)
    if found.missing:
        pytest.skip(f"no {row.device} kernels: {found.missing}")
    if lack := row.needs(found):
        pytest.skip(lack)
    return Spelled(Insistent(row), torch.device(row.device))


@pytest.fixture
def gpu_kernels() -> None:
    """Skip where a GPU's kernels cannot be had."""
    if missing := trusted("cuda").missing:
        pytest.skip(f"no cuda kernels: {missing}")


@pytest.fixture
def kernels() -> None:
    """Skip where the CPU's kernels cannot be had."""
    if missing := ops.device("cpu").missing:
        pytest.skip(f"no cpu kernels: {missing}")
