"""The Hopper kernels on a CPU: as emulated.py, with the engines of sm_90a beside the threads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdquant_nodes.svdquant.core.weights import LinearWeights

from .emulated import GemmInt8, Kernels, _data, _floats, _output, _poisoned, library

ARCH = 90


@dataclass(frozen=True)
class Hopper(Kernels):
    """The kernels of a card with so many SMs: few blocks take many tiles each, many one."""

    arch: int = ARCH
    sms: int = 4

    def gemm_int4(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """As core.reference.gemm_int4, signed or unsigned by the codes' dtype."""
        library(self.arch).set_multiprocessors(self.sms)
        kind = "int4" if codes.dtype == torch.int8 else "int4-unsigned"
        return self.gemm("hopper", kind, codes, scales, hidden, weights, dtype=dtype)

    def gemm_int8(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        """As core.reference.gemm_int8."""
        (m, k), n, w = codes.shape, weights.out_features, weights
        out = _poisoned(m, n, dtype=dtype) if out is None else out
        library(self.arch).set_multiprocessors(self.sms)
        pointers = map(_data, (codes, scales, hidden, w.codes, w.scales))
        args = GemmInt8(m, n, k, w.rank, *pointers, _floats(w.up), _floats(w.bias), _output(out))
        read = (codes, scales, hidden, w.codes, w.scales, w.up, w.bias)
        self._call("gemm_int8_hopper", args, read=read, written=(out,))
        return out
