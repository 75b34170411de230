"""The one forward of a quantized linear, as calls to the op set it was given.

`ops` is `core.reference` or `kernels.ops`: same names, same signatures. This inversion keeps the mathematics free of
devices, and lets the host's layer, the quantizer and the tests call the very same function.

A host layer may be stored as several linears (`Part`), side by side in its rows or in its columns. A LoRA is more
rank (`Branch`), possibly for some rows or columns only. Parts that read the same input may share its quantization
(sharing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reference import rounded
from .sharing import Quantized, Reader, Slot
from .weights import LinearWeights, QuantSpec


@dataclass(frozen=True, eq=False)
class Part:
    """A stored linear and where its output rows and input columns begin in the host's layer.

    reader   which of the linears that quantize their input alike it is; None where no other does
    """

    weights: LinearWeights
    row: int = 0
    column: int = 0
    reader: Reader | None = None

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.weights.out_features)

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.weights.in_features)


@dataclass(frozen=True, eq=False)
class Branch:
    """Extra rank on raw activations: y[:, rows] += strength * x[:, columns] @ D.T, where D = up @ down.

    down      [r, k]   any float   k = width of `columns`; [n, k] where up is None
    up        [n, r]   any float   n = height of `rows`; None for a dense difference, kept in `down`
    strength  float    the product of every scalar on the way (LoRA strength, alpha / rank)
    rows      slice    output rows of the layer it adds to
    columns   slice    input columns of the layer it reads
    kron      [a, b]   any float   D is the Kronecker product kron (x) (up @ down), which is never formed;
                                   k and n are then a b-th of the width and an a-th of the height
    """

    down: Tensor
    up: Tensor | None
    strength: float
    rows: slice
    columns: slice
    kron: Tensor | None = None

    @property
    def is_pair(self) -> bool:
        """Whether it is more rank, and neither a dense difference nor a Kronecker product."""
        return self.up is not None and self.kron is None

    @property
    def is_dense(self) -> bool:
        """Whether it is a difference as large as the weight."""
        return self.up is None and self.kron is None

    @property
    def rank(self) -> int:
        """Of a pair; 0 for the others."""
        return self.up.shape[1] if self.is_pair else 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.down, self.up, self.kron) if t is not None)

    def map(self, place: Callable[[Tensor], Tensor]) -> Branch:
        """The same branch with every tensor replaced by what `place` makes of it."""
        up, kron = (None if t is None else place(t) for t in (self.up, self.kron))
        return replace(self, down=place(self.down), up=up, kron=kron)

    def scaled(self, by: float) -> Branch:
        """The same branch at another strength."""
        return replace(self, strength=by * self.strength)

    def difference(self) -> Tensor:
        """D, strength included: [height of rows, width of columns] fp32."""
        d = self.down.float() if self.up is None else self.up.float() @ self.down.float()
        return self.strength * (d if self.kron is None else torch.kron(self.kron.float(), d))


def linear(
    x: Tensor,
    weights: LinearWeights,
    ops: ModuleType,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """One stored linear: quantize the activations, multiply, add branch and bias.

    x        [M, K]   fp32 | bf16 | fp16
    out      [M, N]   `dtype` or None      written into and returned; its rows may lie apart
    addend   [M, N]   fp32 or None         added last
    returns  [M, N]   `dtype`, rounded once
    """
    if weights.spec.format == "awq":
        return ops.gemv_awq(x, weights, dtype=dtype, out=out, addend=addend)
    return multiply(quantize(x, weights, ops), weights, ops, dtype=dtype, out=out, addend=addend)


def quantize(x: Tensor, weights: LinearWeights, ops: ModuleType) -> Quantized:
    """A linear's first half, which needs its smoothing, `down` and spec alone: codes, scales and hidden values of x."""
    spec = weights.spec
    if spec.format == "int8":
        return ops.quantize_int8(x, weights.smooth, weights.down, spec.act_shift)
    if spec.format == "nvfp4":
        return ops.quantize_nvfp4(x, weights.smooth, weights.down)
    if spec.act_shift:
        return ops.quantize_int4_unsigned(x, weights.smooth, weights.down, spec.act_shift)
    return ops.quantize_int4(x, weights.smooth, weights.down)


def multiply(quantized: Quantized, weights: LinearWeights, ops: ModuleType, **to: Any) -> Tensor:
    """A linear's second half: the product of what `quantize` made, branch and bias; `to` as in `linear`."""
    return getattr(ops, f"gemm_{weights.spec.format}")(*quantized, weights, **to)


def feed_forward(
    x: Tensor,
    first: LinearWeights,
    second: LinearWeights,
    ops: ModuleType,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Two linears that have a fused op, with a GELU between whose activations a kernel need not write down.

    x        [M, K]   bf16 | fp16 | fp32   the activations between are rounded to its dtype
    returns  [M, N]   `dtype`, rounded once; of `second`
    """
    between = through_gelu(quantize(x, first, ops), first, second, ops, dtype=x.dtype)
    return multiply(between, second, ops, dtype=dtype)


def through_gelu(
    quantized: Quantized, first: LinearWeights, second: LinearWeights, ops: ModuleType, *, dtype: torch.dtype
) -> Quantized:
    """The product of what `quantize` made, GELU, and the next linear's input; `dtype` is that between them."""
    op = getattr(ops, fused_op(first.spec, second.spec))
    return op(*quantized, first, second, dtype=dtype)


def fused_op(first: QuantSpec, second: QuantSpec) -> str | None:
    """The op that computes linears of these specs so, None if there is none: both int4, shifted for the second alone,
    or both nvfp4."""
    alike = first.format == second.format and first.format in ("int4", "nvfp4")
    return f"gemm_{first.format}_gelu" if alike and not first.act_shift else None


Recall = Callable[[Reader, Callable[[], Quantized]], Quantized]  # Slot.recall for one x


def join(
    x: Tensor,
    parts: Sequence[Part],
    ops: ModuleType,
    *,
    dtype: torch.dtype = torch.float32,
    recall: Recall | None = None,
) -> Tensor:
    """A layer made of parts, each of which ends its own work: parts below each other write into their columns of the
    output, and of parts beside each other each adds the sum of those before it, in fp32.

    parts    either all below each other or all beside each other, in order and without gaps, as `assemble` makes them
    recall   where parts that are readers get their quantized input from; None lets each make its own
    x        [M, K]   fp32 | bf16 | fp16
    returns  [M, N]   `dtype`, rounded once
    """
    if len(parts) == 1:
        return _one(x, parts[0], ops, recall, dtype=dtype)
    if parts[-1].column:
        return summed(x, parts, ops, recall, dtype=dtype)
    y = x.new_empty(x.shape[0], parts[-1].rows.stop, dtype=dtype)
    for part in parts:
        _one(x, part, ops, recall, dtype=dtype, out=y[:, part.rows])
    return y


def summed(
    x: Tensor, parts: Sequence[Part], ops: ModuleType, recall: Recall | None = None, *, dtype: torch.dtype
) -> Tensor:
    """Parts beside each other, in order, as `join` takes them."""
    y = None
    for part in parts:
        to = dtype if part is parts[-1] else torch.float32
        y = _one(x[:, part.columns], part, ops, recall, dtype=to, addend=y)
    return y


def _one(x: Tensor, part: Part, ops: ModuleType, recall: Recall | None, **to: Any) -> Tensor:
    if recall is None or part.reader is None:
        return linear(x, part.weights, ops, **to)
    return multiply(quantize_part(x, part, ops, recall), part.weights, ops, **to)


def quantize_part(x: Tensor, part: Part, ops: ModuleType, recall: Recall | None) -> Quantized:
    """A part's input, quantized by it or by another that quantizes alike."""
    make = partial(quantize, x, part.weights, ops)
    return make() if recall is None or part.reader is None else recall(part.reader, make)


def with_bias(parts: Sequence[Part], bias: Tensor | None) -> Sequence[Part]:
    """The parts with a layer's bias shared out among them, so that a kernel adds it: once, whatever their number."""
    if bias is None:
        return parts
    biased = [part for part in parts if not part.column]  # one of those that are summed, or every row
    given = [replace(part, weights=replace(part.weights, bias=bias[part.rows])) for part in biased]
    return [*given, *parts[len(given) :]]


def absorb(x: Tensor, parts: Sequence[Part], branches: Sequence[Branch]) -> tuple[list[Part], list[Branch]]:
    """Parts that have the branches as more rank of their own, and the branches that must be added beside them.

    So a LoRA costs a kernel a few ranks, and its output is written once. A part with rank of its own reads its input
    alone, since its hidden values are others. Dense differences and Kronecker products have no rank to give, AWQ parts
    no place for it. The strength goes into `down`, so that `up` may stay in 16 bits. Where x has 16 bits, `down` is
    rounded to the dtype of the part's own, which tensor cores take; that costs at most what rounding the branch's share
    of the output does.

    Done anew in every forward, on purpose: a few small copies. Kept, the pairs of FLUX.1 would take 0.4 GB beside the
    4-bit model for a LoRA of rank 16 and 1.2 GB for one of rank 128.
    """
    fits = [b for b in branches if b.is_pair]
    if not fits or any(part.weights.down is None for part in parts):
        return list(parts), list(branches)
    size = parts[-1].rows.stop, x.shape[1]
    wider = [replace(part, weights=_with_rank(x, part, fits, size), reader=None) for part in parts]
    return wider, [b for b in branches if not b.is_pair]


def _with_rank(x: Tensor, part: Part, branches: Sequence[Branch], size: tuple[int, int]) -> LinearWeights:
    downs, ups = [part.weights.down], [part.weights.up]
    for branch in branches:
        rows = _common(branch.rows, part.rows, size[0])
        columns = _common(branch.columns, part.columns, size[1])
        if rows and columns:
            downs.append(_padded(branch.down[:, columns[0]].float() * branch.strength, columns[1]))
            ups.append(_padded(branch.up[rows[0]], (0, 0, *rows[1])))
    if x.dtype.itemsize == 2:
        downs = [down.to(part.weights.down.dtype) for down in downs]
    return replace(part.weights, down=torch.cat(downs), up=torch.cat(ups, dim=1))


def _padded(tensor: Tensor, zeros: tuple[int, ...]) -> Tensor:
    return pad(tensor, zeros) if any(zeros) else tensor  # torch copies even where there is nothing to add


def _common(branch: slice, part: slice, size: int) -> tuple[slice, tuple[int, int]] | None:
    """Which of a branch's rows or columns a part has, and how many of the part's come before and behind them."""
    start, stop, _ = branch.indices(size)
    first, last = max(start, part.start), min(stop, part.stop)
    return (
        (slice(first - start, last - start), (first - part.start, part.stop - last)) if first < last else None
    )


def add_branches(y: Tensor, x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Add LoRA branches to a layer's output, in fp32.

    y        [M, N]   fp32   changed in place
    x        [M, K]   any float
    returns  [M, N]   fp32
    """
    for branch in branches:
        y[:, branch.rows] += _through(branch, x[:, branch.columns].float())
    return y


def _through(branch: Branch, x: Tensor) -> Tensor:
    """A branch's product. Kronecker: x as a [b, k] matrix X, (kron (x) D) x = kron X D.T, two small products."""
    if branch.kron is not None:
        x = x.unflatten(1, (branch.kron.shape[1], -1))
    h = x @ branch.down.float().T * branch.strength
    h = h if branch.up is None else h @ branch.up.float().T
    return h if branch.kron is None else (branch.kron.float() @ h).flatten(1)


def _matrix(x: Tensor) -> Tensor:
    """Tokens as rows. A matrix is taken as it is: reshaping it to itself is not free, least of all with cold caches."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _like(x: Tensor, y: Tensor) -> Tensor:
    """Rows of an output under the leading axes of the input."""
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def forward(
    x: Tensor,
    parts: Sequence[Part],
    bias: Tensor | None,
    branches: Sequence[Branch],
    ops: ModuleType,
    slot: Slot | None = None,
) -> Tensor:
    """A host layer's forward.

    slot     what its parts share with those of other layers that are given the same x; None shares nothing
    x        [..., K]   fp32 | bf16 | fp16
    bias     [N]        any float or None      added once; the parts carry none of their own here
    returns  [..., N]   as x
    """
    flat = _matrix(x)
    recall = None if slot is None else partial(slot.recall, x)
    parts, beside = absorb(flat, with_bias(parts, bias), branches)
    if beside:
        y = rounded(add_branches(join(flat, parts, ops, recall=recall), flat, beside), x.dtype)
    else:
        y = join(flat, parts, ops, dtype=x.dtype, recall=recall)
    return _like(x, y)


Layer = tuple[Sequence[Part], Sequence[Branch]]  # a host layer's parts, with its bias, and its branches


def forward_pair(x: Tensor, first: Layer, second: Layer, ops: ModuleType) -> Tensor | None:
    """Two host layers of one part each with a GELU between; None where no op is fused for the two, or a branch
    cannot join its part.

    x        [..., K]   fp32 | bf16 | fp16
    returns  [..., N]   as x; the bits that `forward`, GELU and `forward` give
    """
    flat = _matrix(x)
    between = flat.new_empty(0, second[0][0].weights.in_features)
    (one, *more), beside = absorb(flat, *first)
    (two, *others), beside_too = absorb(between, *second)
    if more or others or beside or beside_too or fused_op(one.weights.spec, two.weights.spec) is None:
        return None
    return _like(x, feed_forward(flat, one.weights, two.weights, ops, dtype=x.dtype))
