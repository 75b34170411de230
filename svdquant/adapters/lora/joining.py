"""The patches of one quantized layer, in the host's form, as the branches that mean the same.

Patches that do not look at the weight (LoRA, LoHa, LoKr, differences) join one by one, as factors.py writes them.
DoRA, OFT, BOFT, a scaled base and replacements do look at it: the host's own arithmetic is run on the dequantized
weight as patched so far, and what it changed joins as one dense branch. Exact too, but as large as the 16-bit layer.
GLoRA looks at the weight through a thin matrix only, so it stays low-rank: W + B + W A = W + [B1 | W A1] [B2 ; A2].

Branches are made once and kept in RAM; where they are computed with is residence.py's matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...core.linear import Branch
from .. import layout
from ..devices import able
from ..operations import QuantizedLinear
from . import factors
from .factors import Factored
from .patches import Patch, is_blind, members_of, misfit, region
from .truncation import error_limit, truncated

REMEMBERED = 4  # sets of patches a layer: the model's, and those with the hooks of two or three conditionings


@dataclass(frozen=True, eq=False)
class Joined:
    """The branches of a layer, and what is worth saying about them.

    error    largest relative error of a truncation, 0 where every branch is exact
    misfit   why a patch was left out, empty where none was
    """

    branches: tuple[Branch, ...]
    error: float = 0.0
    misfit: str = ""

    @property
    def dense(self) -> int:
        """Bytes of whole differences, which are as large as the 16-bit layer."""
        return sum(b.down.nbytes for b in self.branches if b.is_dense)


# The last results by layer, each with the patches it came of: a hook that switches to and fro joins nothing anew.
_recent: WeakKeyDictionary[QuantizedLinear, deque[tuple[tuple, Sequence[Patch], Joined]]] = (
    WeakKeyDictionary()
)


def recall(
    layer: QuantizedLinear, key: str, patches: Sequence[Patch], device: torch.device
) -> tuple[Joined, bool]:
    """`join`, and whether it had to be done; a layer's last results are kept."""
    if not patches:
        return Joined(()), False
    recent = _recent.setdefault(layer, deque(maxlen=REMEMBERED))
    signature = (error_limit(), *((p[0], id(p[1]), p[2], p[3], id(p[4])) for p in patches))
    for known, _, joined in recent:
        if known == signature:
            return joined, False
    joined = join(layer, key, patches, device)
    recent.append(
        (signature, tuple(patches), joined)
    )  # the patches too: an id is only good while its owner lives
    return joined, True


def forget(layer: QuantizedLinear) -> None:
    """Let go of a layer's last results and the patches they came of."""
    _recent.pop(layer, None)


def join(layer: QuantizedLinear, key: str, patches: Sequence[Patch], device: torch.device) -> Joined:
    """The branches in RAM that a layer's patches mean; worked out on `device`, if it is able.

    A patch that does not fit the layer is left out and noted, as the host leaves it out of a 16-bit layer.
    """
    branches: list[Branch] = []
    error, wrong, shape = 0.0, "", (layer.out_features, layer.in_features)
    for patch in patches:
        rows, columns = region(patch[3], shape)
        why = _misfit(patch, shape)
        if why:
            wrong = why
        elif not is_blind(patch):
            branches = [b.map(_in_ram) for b in _seeing(layer, key, patch, branches, device)]
        elif patch[0]:
            found = factored(patch[1], device)
            branches += [_placed(b, patch[0], rows, columns) for b in found.branches]
            error = max(error, found.error)
    return Joined(_one_dense(branches, shape), error, wrong)


def _misfit(patch: Patch, shape: tuple[int, int]) -> str:
    rows, columns = region(patch[3], shape)
    return misfit(patch[1], (rows.stop - rows.start, columns.stop - columns.start))


# Factors by the adapter they were made of and the limit they keep, so that a new strength or the next load makes
# nothing. The adapter is the LoRA file's own object; for a difference the tensor is.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def factored(value: object, device: torch.device) -> Factored:
    """The branches of a blind patch at strength 1, in RAM, made once."""
    members, limit, owner = members_of(value), error_limit(), _owner(value)
    held = _kept.get(owner)
    if held is None or held[0] != limit:
        held = (limit, factors.factor(members) or _reduced(value, factors.size(members), device))
        _kept[owner] = held
    return held[1]


def _owner(value: object) -> object:
    return value if isinstance(value, WeightAdapterBase) else members_of(value)["diff"]


def planned(layer: QuantizedLinear, patches: Sequence[Patch]) -> int:
    """How many bytes the branches of patches will take, before they are made; at most, where nothing is low-rank."""
    shape = layer.out_features, layer.in_features
    whole, total = shape[0] * shape[1] * torch.bfloat16.itemsize, 0
    for patch in patches:
        if _misfit(patch, shape):
            continue
        members = members_of(patch[1]) if is_blind(patch) else {}
        held = _kept.get(_owner(patch[1])) if members else None
        total += held[1].nbytes if held else (factors.planned(members) or whole)
    return total


def _reduced(value: object, size: tuple[int, int], device: torch.device) -> Factored:
    """A difference without exact factors: of low rank within the limit, or whole."""
    zeros = torch.zeros(size, dtype=torch.float32, device=able(device))
    delta = comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], zeros, "")
    found = truncated(delta, error_limit()) or factors.whole(delta, _dtype(device))
    return replace(found, branches=tuple(b.map(_in_ram) for b in found.branches))


def _in_ram(tensor: Tensor) -> Tensor:
    return tensor.cpu()


def _dtype(device: torch.device) -> torch.dtype:
    return comfy.model_management.lora_compute_dtype(device)


@dataclass(frozen=True)
class Cost:
    """What a patch costs a layer: ranks and bytes added, whether as a whole difference, at what relative error."""

    rank: int
    nbytes: int
    dense: bool = False
    error: float = 0.0


def cost(layer: QuantizedLinear, patch: Patch, device: torch.device) -> Cost:
    """The cost of a patch, before it is joined; that of a patch that looks at the weight is known by its kind."""
    if is_blind(patch):
        found = factored(patch[1], device)
        return Cost(found.rank, found.nbytes, bool(Joined(found.branches).dense), found.error)
    members = members_of(patch[1]) or {}
    if "a1.weight" in members and "dora_scale" not in members:
        rank = 2 * min(members["a1.weight"].flatten(1).shape)
        return Cost(rank, 4 * rank * (layer.out_features + layer.in_features))
    return Cost(0, layer.out_features * layer.in_features * _dtype(device).itemsize, dense=True)


def _placed(branch: Branch, strength: float, rows: slice, columns: slice) -> Branch:
    return replace(
        branch,
        strength=branch.strength * strength,
        rows=slice(branch.rows.start + rows.start, branch.rows.stop + rows.start),
        columns=slice(branch.columns.start + columns.start, branch.columns.stop + columns.start),
    )


def _seeing(
    layer: QuantizedLinear, key: str, patch: Patch, joined: list[Branch], device: torch.device
) -> list[Branch]:
    """The branches after a patch that looks at the weight as the branches before it have left it."""
    weight = layer.weight.to(device=able(device))  # dequantized here: its own method would round to 16 bits
    base, _ = layout.dense(layout.unpack(weight._qdata, weight._params), tuple(weight.shape), None)
    before = base + dense_sum(joined, tuple(base.shape), device=base.device)
    pair = _glora(patch, before)
    if pair is not None:
        return [*joined, pair]
    after = comfy.lora.calculate_weight([patch], before.clone(), key)
    if after.shape != base.shape:
        raise ValueError(
            f"{key}: a LoRA reshapes this layer from {list(base.shape)} to {list(after.shape)}, "
            "which a quantized layer cannot follow. Use a 16-bit model with this LoRA."
        )
    if torch.equal(after, before):  # the host could not read it, and said so
        return joined
    return list(factors.whole(after - base, _dtype(device)).branches)


def _glora(patch: Patch, weight: Tensor) -> Branch | None:
    strength, value, strength_model, offset, function = patch
    if strength_model != 1.0 or function is not None:
        return None
    rows, columns = region(offset, tuple(weight.shape))
    found = factors.glora(members_of(value) or {}, weight[rows, columns])
    return None if found is None else _placed(found, strength, rows, columns)


def dense_sum(branches: Sequence[Branch], shape: tuple[int, int], *, device: torch.device) -> Tensor:
    """What branches add to a layer's weight: [n, k] fp32 on `device`."""
    total = torch.zeros(shape, dtype=torch.float32, device=device)
    for branch in branches:
        total[branch.rows, branch.columns] += branch.map(lambda t: t.to(device)).difference()
    return total


def _one_dense(branches: list[Branch], shape: tuple[int, int]) -> tuple[Branch, ...]:
    """Dense differences of the whole layer added up: two of them need no more memory than one."""
    whole = [b for b in branches if b.is_dense and tuple(b.down.shape) == shape]
    if len(whole) < 2:
        return tuple(branches)
    total = dense_sum(whole, shape, device=whole[0].down.device).to(whole[0].down.dtype)
    rest = [b for b in branches if all(b is not other for other in whole)]
    return (*rest, Branch(total, None, 1.0, *region(None, shape)))
