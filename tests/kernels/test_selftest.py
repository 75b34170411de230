"""The check that a GPU's kernels must pass: it lets right op sets through, and names what is wrong with any other."""

from __future__ import annotations

import time

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.kernels import ops, select, selftest
from svdquant_nodes.tests.kernels.emulated import COMPILER, EmulatedOps

CPU = torch.device("cpu")


class Wrong:
    """core.reference with one op's results passed through `spoil`."""

    def __init__(self, op, spoil):
        self.op, self.spoil = op, spoil

    def __getattr__(self, op):
        right = getattr(reference, op)
        return (lambda *args, **to: self.spoil(right(*args, **to))) if op == self.op else right


def poke(t, value):
    """One number of a result, the last one."""
    t.view(-1)[-1] = value
    return t


def result(index, value):
    """One number of one of a quantizer's three results."""
    return lambda made: (*made[:index], poke(made[index], value), *made[index + 1 :])


def refuse(_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


def only_in(dtype, value):
    return lambda y: poke(y, value) if y.dtype == dtype else y


def beside(y):
    """The column after its own, where it is given columns of a wider output."""
    if not y.is_contiguous():
        y.as_strided((y.shape[0], y.shape[1] + 1), y.stride())[:, -1] = 1
    return y


FAULTS = {  # op, how its results are spoilt, what is said
    "a-code": ("quantize_int4", result(0, 100), "quantize_int4 gave 1 of 3648 codes wrong (19 x 70 x 192"),
    "a-scale": ("quantize_nvfp4", result(1, 9.0), "quantize_nvfp4 gave 1 of 95 scales wrong"),
    "a-hidden-value": (
        "quantize_int4_unsigned",
        result(2, torch.nan),
        "quantize_int4_unsigned is off by nan",
    ),
    "an-output": ("gemm_int4", lambda y: poke(y, 50.0), "gemm_int4 is off by"),
    "a-16-bit-output": ("gemm_nvfp4", only_in(torch.bfloat16, 50.0), "gemm_nvfp4 is off by"),
    "outputs-swapped": ("gemv_awq", lambda y: y.flip(-1), "gemv_awq is off by"),
    "a-small-error": ("gemm_int4", lambda y: y * 1.001, "gemm_int4 is off by"),
    "a-neighbour": ("gemm_nvfp4", beside, "gemm_nvfp4 wrote beside its columns (19 x 70 x 80"),
    "a-part-of-a-layer": (
        "gemv_awq",
        lambda y: y if y.is_contiguous() else y.mul_(0.5),
        "gemv_awq is off by",
    ),
    "a-code-after-a-gelu": (
        "gemm_int4_gelu",
        result(0, 100),
        "gemm_int4_gelu gave 1 of 2432 codes wrong (19 x 128 x 192",
    ),
    "all-codes-one-too-many": (
        "gemm_int4_gelu",
        lambda made: (made[0] + 1, *made[1:]),
        "gemm_int4_gelu gave 2432 of 2432 codes wrong",
    ),
    "a-scale-after-a-gelu": ("gemm_int4_gelu", result(1, 9.0), "gemm_int4_gelu is off by"),
    "nvfp4-codes-after-a-gelu": (
        "gemm_nvfp4_gelu",
        lambda made: (made[0] ^ 8, *made[1:]),
        "gemm_nvfp4_gelu gave",
    ),
    "an-nvfp4-scale-after-a-gelu": (
        "gemm_nvfp4_gelu",
        result(1, 9.0),
        "gemm_nvfp4_gelu gave 1 of 152 scales wrong (19 x 128 x 208",
    ),
    "a-hidden-value-after-a-gelu": ("gemm_nvfp4_gelu", result(2, 9.0), "gemm_nvfp4_gelu is off by"),
    "eight-bits": ("gemm_int8", lambda y: poke(y, torch.inf), "gemm_int8 is off by inf"),
    "cuda-error": (
        "gemv_awq",
        refuse,
        "gemv_awq ended with 'CUDA error: an illegal memory access was encountered' (1 x",
    ),
    "other-shape": (
        "gemm_int4",
        lambda y: y[:, :-1],
        "gemm_int4 gave a shape of [19, 69], expected [19, 70]",
    ),
    "other-type": (
        "quantize_int4",
        lambda made: (made[0].float(), *made[1:]),
        "quantize_int4 gave codes of torch.float32 [19, 192], expected torch.int8 [19, 192]",
    ),
}


@pytest.mark.parametrize(("op", "spoil", "text"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_op_is_named(op, spoil, text):
    fault = selftest.problem(Wrong(op, spoil), CPU, select.OPS)
    assert fault.op == op and str(fault).startswith(text)


def test_the_reference_passes_in_little_time():
    start = time.process_time()
    assert selftest.problem(reference, CPU, select.OPS) is None
    assert time.process_time() - start < 3.0


def test_only_what_a_device_runs_is_checked():
    everything_wrong = Wrong("gemm_int4", refuse)
    assert (
        selftest.problem(everything_wrong, CPU, ("quantize_int4", "quantize_int4_unsigned", "gemv_awq"))
        is None
    )


@pytest.mark.usefixtures("kernels")
def test_the_kernels_of_this_processor_pass():
    assert selftest.problem(ops.OpSet(), CPU, select.OPS) is None


@pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")
@pytest.mark.parametrize(
    ("spelling", "arch"),
    [
        *(
            ("mma_sm75", 75),
            ("mma_s4", 80),
            ("mma_s8", 90),
            ("wgmma_e4m3_x4", 90),
            ("wgmma_s8_x2", 90),
            ("mxf4_sm120", 120),
        ),
        *(("gelu_sm75", 75), ("gelu_s4", 80), ("gelu_s8", 120), ("gelu_f16", 80), ("gelu_mxf4", 120)),
    ],
)
def test_the_kernels_of_a_gpu_pass_when_emulated(monkeypatch, spelling, arch):
    """Small tiles only: the emulator takes a second for a large one."""
    row = next(row for row in select.SPELLINGS if row.name == spelling)
    monkeypatch.setattr(selftest, "CASES", [c for c in selftest.CASES if c.n < 130])
    names = row.ops if row.beside else select.LAYER_OPS
    assert selftest.problem(EmulatedOps(arch, spelling), CPU, names, row.dtypes) is None
