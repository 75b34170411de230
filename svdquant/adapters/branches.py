"""The host's LoRA patches as low-rank branches of quantized layers.

Whatever node applied it, a LoRA sits in `patcher.patches` (or in hook patches) under a layer's key. The host would
merge it into a dense weight; a quantized layer runs it beside the 4-bit product instead. Callbacks of the patcher,
which `clone()` copies along, keep the layers' `branches` equal to what the patcher says:

  ON_LOAD           the patches of the patcher being loaded
  ON_APPLY_HOOKS    plus those of the hooks of the conditioning about to run
  ON_PREPARE_STATE  each step: back to the base where the host dropped its hooks without a callback
  ON_CLEANUP        back to the base after sampling
  ON_DETACH         nothing, so that no LoRA stays on the device; but a clone that merely dies or gives way to
                    another clone of the loaded model (unpatch_all is False) must not touch that one's branches
  ON_CLONE          the clone is shadowed too (patcher.py)

A plain LoRA joins exactly, as a pair. Everything else (LoHa, LoKr, DoRA, OFT, full differences, a scaled base) is
applied by the host's own arithmetic to the dequantized weight, and the difference joins as a dense branch: exact too,
at the memory of the 16-bit layer, which is logged.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence

import comfy.lora
import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..core.linear import Branch
from .operations import QuantizedLinear, quantized_linears
from .patcher import shadow

KEY = "svdquant"
log = logging.getLogger("svdquant-nodes")

Patch = tuple  # (strength, adapter or difference, strength_model, offset, function), as the host keeps it


def attach(patcher) -> None:
    """Keep the branches of a freshly loaded patcher, and of all its clones, in step with its patches."""
    for event, callback in (
        (CallbacksMP.ON_LOAD, lambda patcher, *_: set_branches(patcher)),
        (CallbacksMP.ON_APPLY_HOOKS, lambda patcher, hooks: set_branches(patcher, hooks)),
        (CallbacksMP.ON_PREPARE_STATE, lambda patcher, *_: _drop_stale_hooks(patcher)),
        (CallbacksMP.ON_CLEANUP, lambda patcher: set_branches(patcher) if patcher.hook_patches else None),
        (
            CallbacksMP.ON_DETACH,
            lambda patcher, unpatch_all: clear_branches(patcher) if unpatch_all else None,
        ),
        (CallbacksMP.ON_CLONE, lambda _, clone: shadow(clone)),
    ):
        patcher.add_callback_with_key(event, KEY, callback)
    shadow(patcher)


def set_branches(patcher, hooks=None) -> None:
    """Give every quantized layer the branches that the patcher's patches and those of `hooks` mean for it."""
    hooked: Mapping[str, list[Patch]] = patcher.get_combined_hook_patches(hooks) if hooks is not None else {}
    dense_bytes = 0
    for key, layer in quantized_linears(patcher.model):
        patches = [*patcher.patches.get(key, ()), *hooked.get(key, ())]
        layer.branches = make_branches(layer, key, patches, patcher.load_device)
        layer.wrappers = tuple(patcher.weight_wrapper_patches.get(key, ()))
        dense_bytes += sum(b.down.nbytes for b in layer.branches if b.up is None)
    if dense_bytes:
        log.info(
            "LoRA: %.0f MB of dense branches, for adapters that are not low-rank pairs", dense_bytes / 2**20
        )


def clear_branches(patcher) -> None:
    """Drop every branch, so that its tensors can be freed."""
    for _, layer in quantized_linears(patcher.model):
        layer.branches = ()
    _resident.clear()


def _drop_stale_hooks(patcher) -> None:
    if patcher.hook_patches and patcher.current_hooks is None:
        set_branches(patcher)


def make_branches(
    layer: QuantizedLinear, key: str, patches: Sequence[Patch], device: torch.device
) -> tuple[Branch, ...]:
    """The branches that a layer's patches mean, on `device`.

    Plain low-rank pairs become one branch each. One patch that is anything else makes the whole list dense, because
    the host applies patches one after the other and such a patch may depend on the weight before it.
    """
    if not patches:
        return ()
    shape = (layer.out_features, layer.in_features)
    pairs = [_low_rank(patch, shape, device) for patch in patches]
    if all(pair is not None for pair in pairs):
        return tuple(pairs)
    return (_dense_branch(layer, key, patches, device),)


def _low_rank(patch: Patch, shape: tuple[int, int], device: torch.device) -> Branch | None:
    """The branch of a plain LoRA pair, or None where the patch is anything more."""
    strength, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, mid, dora_scale, *reshape = adapter.weights
    if mid is not None or dora_scale is not None or any(r is not None for r in reshape):
        return None
    rows, columns = _slices(offset, shape)
    if (
        up.flatten(1).shape[0] != rows.stop - rows.start
        or down.flatten(1).shape[1] != columns.stop - columns.start
    ):
        return None
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    down, up = _on_device(adapter, device)
    return Branch(down, up, strength * scale, rows, columns)


def _slices(offset: tuple[int, int, int] | None, shape: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of a layer that a patch covers; `offset` is the host's (axis, start, length)."""
    bounds = [slice(0, size) for size in shape]
    if offset is not None:
        axis, start, length = offset
        bounds[axis] = slice(start, start + length)
    return bounds[0], bounds[1]


# Pairs already moved, so that switching hooks every step moves nothing. The adapter is the LoRA file's own object.
_resident: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _on_device(adapter: LoRAAdapter, device: torch.device) -> tuple[Tensor, Tensor]:
    held = _resident.get(adapter)
    if held is None or held[0].device != device:
        up, down = adapter.weights[:2]
        held = (down.flatten(1).to(device), up.flatten(1).to(device))
        _resident[adapter] = held
    return held


def _dense_branch(layer: QuantizedLinear, key: str, patches: Sequence[Patch], device: torch.device) -> Branch:
    """What the host's own arithmetic adds to the dequantized weight, as one dense branch."""
    base = layer.convert_weight(layer.weight.to(device=device, dtype=torch.float32))
    patched = comfy.lora.calculate_weight(list(patches), base.clone(), key)
    if patched.shape != base.shape:
        raise ValueError(
            f"{key}: a LoRA reshapes this layer from {list(base.shape)} to {list(patched.shape)}, "
            "which a quantized layer cannot follow. Use a 16-bit model with this LoRA."
        )
    dtype = comfy.model_management.lora_compute_dtype(device)
    rows, columns = _slices(None, tuple(base.shape))
    return Branch((patched - base).to(dtype), None, 1.0, rows, columns)
