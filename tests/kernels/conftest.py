from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from svdquant_nodes.svdquant.core.weights import LinearWeights
from svdquant_nodes.svdquant.kernels import carrier, gpu, ops, select


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
        """Of a product with its branch, which a GPU sums in 16-bit halves on tensor cores."""
        return "fp32_sum" if self.device.type == "cpu" else "tensor_core_sum"

    def here(self, t: Tensor) -> Tensor:
        return t.to(self.device)

    def written(self, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's codes and scales as this spelling writes them."""
        return carrier.carried(codes, scales) if self.ops.row.e4m3 else (codes, scales)

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
    """A device with its kernels; a GPU's also where they fail the self-test, but for those that end a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "trusted", gpu.survivors)
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
    if row.name in found.distrusted:
        pytest.skip(f"{row.name} ends the process of its self-test")
    return Spelled(Insistent(row), torch.device(row.device))


@pytest.fixture(autouse=True)
def living_card(request: pytest.FixtureRequest) -> Iterator[None]:
    """After some mistakes a process can compute nothing more on a GPU: it ends, and does not blame every other test."""
    yield
    if not request.node.get_closest_marker("gpu") or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist says which test it was, and starts another worker
        pytest.exit(f"no more CUDA in this process after {request.node.nodeid}: {error}", returncode=3)


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
