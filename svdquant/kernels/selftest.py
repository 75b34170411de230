"""A short check of a device's kernels before they are trusted with a picture: small layers against core.reference.

A kernel that is wrong on a card nobody has tried would paint noise and blame the model. So the ops that a device would
run are called once a process on random layers whose sizes have tails, and compared with the reference on the CPU: codes
and scales for equality, sums closely enough that one wrong number shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ..core import int8, linear, reference
from ..core.weights import AWQ, INT4, INT4_UNSIGNED, NVFP4, LinearWeights, QuantSpec
from . import carrier

LIMITS = {  # of the largest error, as a part of the largest number
    torch.float32: 1e-4,  # branches in two 16-bit halves, sums on tensor cores
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


@dataclass(frozen=True)
class Case:
    """One layer and its input; sizes are chosen for tails, both tiles of a product, and every way to read x."""

    spec: QuantSpec
    m: int
    n: int
    k: int
    rank: int
    dtype: torch.dtype
    eight_bits: bool = False
    gelu: bool = False  # with a GELU behind it, and the next layer's activations

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}, rank {self.rank}, {str(self.dtype).removeprefix('torch.')}"


CASES = (
    Case(INT4, 19, 70, 192, 24, torch.bfloat16),
    Case(INT4, 130, 2052, 320, 40, torch.float16),
    Case(INT4_UNSIGNED, 133, 96, 128, 5, torch.bfloat16),
    Case(INT4, 5, 64, 64, 0, torch.float32),
    Case(NVFP4, 19, 70, 80, 24, torch.bfloat16),
    Case(NVFP4, 130, 2052, 208, 16, torch.float16),
    Case(INT4, 19, 72, 192, 24, torch.bfloat16, eight_bits=True),
    Case(INT4_UNSIGNED, 130, 2052, 320, 40, torch.float16, eight_bits=True),
    # more tiles than a large card has processors, which take several each
    Case(INT4, 1030, 2304, 192, 8, torch.bfloat16),
    Case(INT4, 520, 9216, 192, 8, torch.bfloat16, eight_bits=True),
    Case(INT4, 19, 128, 192, 24, torch.bfloat16, gelu=True),
    Case(INT4, 130, 2112, 64, 40, torch.float16, gelu=True),
    Case(NVFP4, 19, 128, 208, 24, torch.bfloat16, gelu=True),
    Case(NVFP4, 130, 2112, 80, 40, torch.float16, gelu=True),
    Case(AWQ, 1, 70, 1088, 0, torch.bfloat16),
    Case(AWQ, 11, 33, 192, 0, torch.float16),
)


@dataclass(frozen=True)
class Fault:
    """What is wrong with an op, in half a sentence that begins with its name."""

    op: str
    text: str

    def __str__(self) -> str:
        return f"{self.op} {self.text}"


def problem(
    ops: ModuleType,
    device: torch.device,
    names: Collection[str],
    dtypes: Collection[str] = ("float32", "bfloat16", "float16"),
) -> Fault | None:
    """The first thing wrong with an op set on a device, None if nothing.

    names   ops to check; a layer is taken when all that it needs are among them
    dtypes  of activations
    """
    with torch.inference_mode():
        for seed, case in enumerate(CASES):
            if str(case.dtype).removeprefix("torch.") not in dtypes:
                continue
            try:
                for op, faults in _judge(case, seed, ops, device, names):
                    if faults:
                        return Fault(op, f"{faults} ({case})")
            except (RuntimeError, ValueError) as error:  # a refusal, or CUDA's word about an earlier launch
                return Fault(_ops_of(case)[-1], f"ended with {str(error).strip().splitlines()[0]!r} ({case})")
    return None


def _ops_of(case: Case) -> tuple[str, ...]:
    if case.spec.format == "awq":
        return ("gemv_awq",)
    if case.gelu:
        return (f"gemm_{case.spec.format}_gelu",)
    kind = "int8" if case.eight_bits else case.spec.format
    unsigned = "_unsigned" if kind == "int4" and case.spec.act_shift else ""
    return f"quantize_{kind}{unsigned}", f"gemm_{kind}"


def _judge(
    case: Case, seed: int, ops: ModuleType, device: torch.device, names: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Run a case's ops one after the other; yields (op, what is wrong or "")."""
    called = _ops_of(case)
    if not set(called) <= set(names):
        return
    if case.gelu:
        yield from ((called[0], fault) for fault in _judge_gelu(case, seed, ops, device))
        return
    x, weights = _inputs(case, torch.Generator().manual_seed(seed))
    there = _moved(weights, device)
    inputs = (x,)
    if len(called) == 2:
        shift = (case.spec.act_shift,) if case.spec.act_shift else ()
        inputs = getattr(reference, called[0])(x, weights.smooth, weights.down, *shift)
        got = getattr(ops, called[0])(x.to(device), there.smooth, there.down, *shift)
        codes, scales = carrier.carried(*inputs[:2]) if got[0].dtype == carrier.CODES else inputs[:2]
        yield called[0], _different(got[0], codes, "codes") or _different(got[1], scales, "scales")
        yield called[0], _far(got[2], inputs[2])
    want, inputs = getattr(reference, called[-1])(*inputs, weights), [t.to(device) for t in inputs]
    product = partial(getattr(ops, called[-1]), *inputs, there)
    for dtype in dict.fromkeys((torch.float32, case.dtype)):
        yield called[-1], _far(product(dtype=dtype), want)
    yield called[-1], _wrong_as_part(product, case.dtype, want.to(device))


def _wrong_as_part(product: Callable[..., Tensor], dtype: torch.dtype, want: Tensor) -> str:
    """As layers of several parts call it: into columns of a wider output, here with its own result added."""
    m, n = want.shape
    wide = torch.zeros(m, n + 8, dtype=dtype, device=want.device)
    product(dtype=dtype, out=wide[:, 3 : 3 + n], addend=want)
    if wide[:, :3].any() or wide[:, 3 + n :].any():
        return "wrote beside its columns"
    return _far(wide[:, 3 : 3 + n], 2 * want.cpu())


def _judge_gelu(case: Case, seed: int, ops: ModuleType, device: torch.device) -> Iterator[str]:
    """Sums in another order round some activations to their other neighbour, so codes may be one off, but few."""
    generator, op = torch.Generator().manual_seed(seed), _ops_of(case)[0]
    x, weights = _inputs(case, generator)
    then = INT4_UNSIGNED if case.spec == INT4 else case.spec
    _, following = _inputs(replace(case, spec=then, n=64, k=case.n), generator)
    inputs = linear.quantize(x, weights, reference)
    want = getattr(reference, op)(*inputs, weights, following, dtype=case.dtype)
    layers = _moved(weights, device), _moved(following, device)
    got = getattr(ops, op)(*(t.to(device) for t in inputs), *layers, dtype=case.dtype)
    if then == NVFP4:
        yield _neighbours(got[0], want[0], "codes", _e2m1_in_order)
        yield _neighbours(got[1], want[1], "scales", _e4m3_in_order)
    else:
        yield _neighbours(got[0], want[0], "codes", Tensor.int)
        yield _far(got[1], want[1].float(), LIMITS[case.dtype])
    yield _far(got[2], want[2], LIMITS[case.dtype])


def _moved(weights: LinearWeights, device: torch.device) -> LinearWeights:
    return replace(weights, **{name: t.to(device) for name, t in weights.tensors().items()})


def _inputs(case: Case, generator: torch.Generator) -> tuple[Tensor, LinearWeights]:
    """Gaussian activations, and a layer of random codes whose outputs are of size one."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype)

    n, k, rank, spec = case.n, case.k, case.rank, case.spec
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, k // spec.group, generator=generator) + 0.5) * 0.2 * k**-0.5
    x, bias = random(case.m, k), random(n)
    if spec.format == "awq":
        scales = scales.to(case.dtype)
        return x, LinearWeights(spec, codes, scales, zeros=-7 * scales, bias=bias)
    smooth = (torch.rand(k, generator=generator) + 0.5).to(case.dtype)
    branch = dict(
        smooth=smooth, down=random(rank, k, scale=k**-0.5), up=random(n, rank, scale=0.3), bias=bias
    )
    if spec.format == "nvfp4":
        second = torch.full((1,), 2.0**-6, dtype=case.dtype)
        return x, LinearWeights(spec, codes, (scales * 2**6).to(torch.float8_e4m3fn), second, **branch)
    weights = LinearWeights(spec, codes, scales.to(case.dtype), **branch)
    x = x.clamp(min=-spec.act_shift) if spec.act_shift else x  # as a GELU leaves it
    return x, int8.requantize(weights) if case.eight_bits else weights


def _different(got: Tensor, want: Tensor, what: str) -> str:
    got = got.cpu()
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"gave {what} of {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
    wrong = int((got.float() != want.float()).sum())
    return f"gave {wrong} of {want.numel()} {what} wrong" if wrong else ""


def _neighbours(got: Tensor, want: Tensor, what: str, in_order: Callable[[Tensor], Tensor]) -> str:
    """Whether numbers are right but for one in a hundred, and none further off than to its neighbour."""
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return _different(got, want, what)
    apart = (in_order(got.cpu()) - in_order(want)).abs()
    wrong, most = int((apart > 0).sum()), int(apart.max())
    return f"gave {wrong} of {want.numel()} {what} wrong" if most > 1 or wrong > want.numel() // 100 else ""


def _e2m1_in_order(codes: Tensor) -> Tensor:
    """Integers of which neighbours differ by one; both zeros are one number."""
    magnitudes = codes.int() & 7
    return torch.where(codes > 7, -magnitudes, magnitudes)


def _e4m3_in_order(scales: Tensor) -> Tensor:
    """The same of scales, which are not negative."""
    return scales.view(torch.uint8).int()


def _far(got: Tensor, want: Tensor, limit: float | None = None) -> str:
    """Compares with fp32 numbers what may be of 16 bits."""
    if got.shape != want.shape:
        return f"gave a shape of {list(got.shape)}, expected {list(want.shape)}"
    if not want.numel():
        return ""
    error, size = float((got.cpu().float() - want).abs().max()), float(want.abs().max())
    return (
        ""
        if error <= (limit or LIMITS[got.dtype]) * size
        else f"is off by {error:.3g} where {size:.3g} is the largest number"
    )
