"""The patches of one quantized layer, in the host's form, as the branches that mean the same.

Patches that do not look at the weight (LoRA, LoHa, LoKr, differences) join one by one, as factors.py writes them.
DoRA, OFT, BOFT, a scaled base and replacements do look at it: the host's own arithmetic is run on the dequantized
weight as patched so far, and what it changed joins as one dense branch. Exact too, but as large as the 16-bit layer.
GLoRA looks at the weight through a thin matrix only, so it stays low-rank: W + B + W A = W + [B1 | W A1] [B2 ; A2].
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..core.linear import Branch
from . import factors, layout
from .factors import Factored
from .operations import QuantizedLinear

Patch = tuple  # (strength, adapter or difference, strength_model, offset, function), as the host keeps it

# What the host's adapters keep in `weights`, in its order, by our tails.
_WEIGHTS = {
    "lora": "lora_up.weight lora_down.weight alpha lora_mid.weight dora_scale reshape_weight",
    "loha": "hada_w1_a hada_w1_b alpha hada_w2_a hada_w2_b hada_t1 hada_t2 dora_scale",
    "lokr": "lokr_w1 lokr_w2 alpha lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2 dora_scale",
    "glora": "a1.weight a2.weight b1.weight b2.weight alpha dora_scale",
    "oft": "oft_blocks rescale alpha dora_scale",
    "boft": "oft_blocks rescale alpha dora_scale",
}
_BLIND = ("lora", "loha", "lokr")  # adapters that never look at the weight


@dataclass
class Notes:
    """What is worth a line in the log: dense differences, truncations, patches that do not fit."""

    dense: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)

    def lines(self):
        """One line a kind, none where there was nothing."""
        if self.dense:
            size = sum(self.dense.values()) / 2**20
            yield f"{size:.0f} MB of dense differences on {len(self.dense)} layers, for adapters that are not low-rank"
        if self.errors:
            yield f"low rank on {len(self.errors)} layers, largest relative error {max(self.errors.values()):.1e}"
        if self.misfits:
            key, why = next(iter(self.misfits.items()))
            yield f"skipped on {len(self.misfits)} layers, which it does not fit, such as {key}: {why}"


def error_limit() -> float:
    """Largest relative error a truncation may have before the difference is kept whole (SVDQUANT_LORA_ERROR).

    Raises ValueError where the setting is no number.
    """
    setting = os.environ.get("SVDQUANT_LORA_ERROR") or "0.001"
    try:
        return float(setting)
    except ValueError:
        raise ValueError(f"SVDQUANT_LORA_ERROR: expected a number such as 0.001, got {setting!r}.") from None


def join(
    layer: QuantizedLinear, key: str, patches: Sequence[Patch], device: torch.device, notes: Notes
) -> tuple[Branch, ...]:
    """The branches that a layer's patches mean, on `device`.

    A patch that does not fit the layer is left out and noted, as the host leaves it out of a 16-bit layer.
    """
    joined: list[Branch] = []
    shape = (layer.out_features, layer.in_features)
    for patch in patches:
        rows, columns = region(patch[3], shape)
        why = misfit(patch[1], (rows.stop - rows.start, columns.stop - columns.start))
        if why:
            notes.misfits[key] = why
        elif is_blind(patch):
            if not patch[0]:
                continue
            found = factored(patch[1], device)
            joined += [_placed(b, patch[0], rows, columns) for b in found.branches]
            if found.error:
                notes.errors[key] = max(found.error, notes.errors.get(key, 0.0))
        else:
            joined = _seeing(layer, key, patch, joined, device)
    branches = _one_dense(joined, shape)
    dense = sum({id(b.down): b.down.nbytes for b in branches if b.up is None and _covers(b, shape)}.values())
    if dense:
        notes.dense[key] = dense
    return branches


def forget() -> None:
    """Drop every factor kept for a later load."""
    _kept.clear()


def region(offset: tuple[int, int, int] | None, shape: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of a layer that a patch covers; `offset` is the host's (axis, start, length)."""
    bounds = [slice(0, extent) for extent in shape]
    if offset is not None:
        axis, start, length = offset
        bounds[axis] = slice(start, start + length)
    return bounds[0], bounds[1]


def members_of(value: object) -> Mapping[str, Tensor] | None:
    """The tensors of a patch by tail; None for what is neither an adapter the host knows nor a difference."""
    if isinstance(value, WeightAdapterBase):
        names = _WEIGHTS.get(value.name, "").split()
        return {n: t for n, t in zip(names, value.weights, strict=False) if t is not None} if names else None
    if isinstance(value, tuple) and (len(value) == 1 or value[0] == "diff"):
        tensors = value[-1] if isinstance(value[-1], tuple | list) else value
        padded = len(tensors) > 1 and tensors[1].get("pad_weight")
        return None if padded or not isinstance(tensors[0], Tensor) else {"diff": tensors[0]}
    return None


def is_blind(patch: Patch) -> bool:
    """Whether what a patch adds is the same whatever the weight is."""
    _, value, strength_model, _, function = patch
    members = members_of(value)
    if strength_model != 1.0 or function is not None or members is None:
        return False
    return "diff" in members or (value.name in _BLIND and not {"dora_scale", "reshape_weight"} & set(members))


def misfit(value: object, shape: tuple[int, int]) -> str:
    """Why a patch cannot be applied to a region of this shape; empty where it can, or where only trying will tell."""
    members = members_of(value)
    if members is None:
        return ""
    try:
        found = factors.size(members)
    except ValueError as error:
        return str(error)
    if found is None and "diff" in members:
        found = tuple(members["diff"].shape)
    if found is None or found in (shape, tuple(members.get("reshape_weight", ()))):
        return ""
    return f"expected {list(shape)}, got {list(found)}"


# Factors by the adapter they were made of, so that a new strength or the next hook makes and moves nothing. The
# adapter is the LoRA file's own object; for a difference the tensor is.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def factored(value: object, device: torch.device) -> Factored:
    """The branches of a blind patch at strength 1, on `device`, made once."""
    members = members_of(value)
    owner = value if isinstance(value, WeightAdapterBase) else members["diff"]
    held = _kept.get(owner)
    if held is None or held[0] != device:
        there = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in members.items()}
        held = (device, factors.factor(there) or _reduced(value, there, device))
        _kept[owner] = held
    return held[1]


@dataclass(frozen=True)
class Cost:
    """What a patch costs a layer: ranks and bytes added, whether densely, at what relative error."""

    rank: int
    nbytes: int
    dense: bool
    error: float


def cost(layer: QuantizedLinear, patch: Patch, device: torch.device) -> Cost:
    """The cost of a patch, before it is joined; that of a patch that looks at the weight is known by its kind."""
    if is_blind(patch):
        found = factored(patch[1], device)
        dense = any(b.up is None for b in found.branches[:1]) and len(found.branches) == 1
        return Cost(found.rank, found.nbytes, dense, found.error)
    members = members_of(patch[1]) or {}
    if "a1.weight" in members and "dora_scale" not in members:
        rank = 2 * min(members["a1.weight"].flatten(1).shape)
        return Cost(rank, 4 * rank * (layer.out_features + layer.in_features), False, 0.0)
    return Cost(0, layer.out_features * layer.in_features * _dtype(device).itemsize, True, 0.0)


def _reduced(value: object, members: Mapping[str, Tensor], device: torch.device) -> Factored:
    """A difference without exact factors: of low rank within the limit, or whole."""
    zeros = torch.zeros(factors.size(members), dtype=torch.float32, device=device)
    delta = comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], zeros, "")
    return factors.truncated(delta, error_limit()) or factors.whole(delta, _dtype(device))


def _dtype(device: torch.device) -> torch.dtype:
    return comfy.model_management.lora_compute_dtype(device)


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
    weight = layer.weight.to(
        device=device
    )  # dequantized here: the tensor's own method would round to 16 bits
    base, _ = layout.dense(layout.unpack(weight._qdata, weight._params), tuple(weight.shape), None)
    before = base + dense_sum(joined, tuple(base.shape), device=device)
    pair = _glora(patch, before)
    if pair is not None:
        return [*joined, pair]
    after = comfy.lora.calculate_weight([patch], before.clone(), key)
    if after.shape != base.shape:
        raise ValueError(
            f"{key}: a LoRA reshapes this layer from {list(base.shape)} to {list(after.shape)}, "
            "which a quantized layer cannot follow. Use a 16-bit model with this LoRA."
        )
    return list(factors.whole(after - base, _dtype(device)).branches)


def _glora(patch: Patch, weight: Tensor) -> Branch | None:
    """GLoRA as one pair; its older form, told by its shapes, has the factors the other way round."""
    strength, value, strength_model, offset, function = patch
    members = members_of(value)
    if strength_model != 1.0 or function is not None or not members or "a1.weight" not in members:
        return None
    if "dora_scale" in members:
        return None
    rows, columns = region(offset, tuple(weight.shape))
    w = weight[rows, columns]
    a1, a2, b1, b2 = (
        members[n].flatten(1).to(w) for n in ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    )
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if old and (not new or a2.shape[0] == w.shape[0] == w.shape[1]):
        a1, a2, b1, b2 = a2, a1, b2, b1
    elif not new:
        return None
    up, down = torch.cat((b1, w @ a1), 1), torch.cat((b2, a2))
    if up.shape[0] != w.shape[0] or down.shape[1] != w.shape[1]:
        return None
    return Branch(down, up, strength * factors.alpha_over(members, a2.shape[0]), rows, columns)


def dense_sum(branches: Sequence[Branch], shape: tuple[int, int], *, device: torch.device) -> Tensor:
    """What branches add to a layer's weight: [n, k] fp32."""
    total = torch.zeros(shape, dtype=torch.float32, device=device)
    for b in branches:
        product = b.down.float() if b.up is None else b.up.float() @ b.down.float()
        total[b.rows, b.columns] += b.strength * product
    return total


def _covers(branch: Branch, shape: tuple[int, int]) -> bool:
    return tuple(branch.down.shape) == shape and branch.up is None


def _one_dense(branches: list[Branch], shape: tuple[int, int]) -> tuple[Branch, ...]:
    """Dense differences of the whole layer added up: two of them need no more memory than one."""
    whole = [b for b in branches if _covers(b, shape)]
    if len(whole) < 2:
        return tuple(branches)
    total = dense_sum(whole, shape, device=whole[0].down.device).to(whole[0].down.dtype)
    rest = [b for b in branches if not _covers(b, shape)]
    return (*rest, Branch(total, None, 1.0, *region(None, shape)))
