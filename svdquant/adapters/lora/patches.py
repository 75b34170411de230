"""One patch in the host's form: which region of a layer it covers, which tensors it holds, whether it fits."""

from __future__ import annotations

from collections.abc import Mapping

from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from . import factors

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
_KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
_BLIND = ("lora", "loha", "lokr")  # adapters that never look at the weight


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


def kind_of(value: object) -> str:
    """What a user calls a patch: LoRA, LoKr, DoRA and so on."""
    if isinstance(value, WeightAdapterBase):
        return "DoRA" if "dora_scale" in (members_of(value) or {}) else _KINDS.get(value.name, value.name)
    return "replacement" if value[0] == "set" else "difference"


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
