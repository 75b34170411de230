"""The Hopper kernels on a CPU: as emulated.py, with the engines of sm_90a beside the threads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from svdquant_nodes.svdquant.core.weights import LinearWeights
from svdquant_nodes.svdquant.kernels import carrier

from .emulated import Kernels

ARCH = 90


@dataclass(frozen=True)
class Hopper(Kernels):
    """The kernels of a card: with few SMs a block takes many tiles, with many one.

    clusters  whether blocks share operands, where that is quicker
    """

    arch: int = ARCH
    clusters: bool = False

    def gemm_int4(
        self, codes: Tensor, scales: Tensor, hidden: Tensor, weights: LinearWeights, **to: object
    ) -> Tensor:
        """As core.reference.gemm_int4."""
        acts = *carrier.carried(codes, scales), hidden
        return self.gemm(self._entry("hopper", 4), "e4m3", *acts, weights, **to)

    def gemm_int8(
        self, codes: Tensor, scales: Tensor, hidden: Tensor, weights: LinearWeights, **to: object
    ) -> Tensor:
        """As core.reference.gemm_int8."""
        return super().gemm_int8(
            codes, scales, hidden, weights, entry=self._entry("gemm_int8_hopper", 2), **to
        )

    def _entry(self, name: str, blocks: int) -> str:
        return f"{name}_x{blocks}" if self.clusters else name
