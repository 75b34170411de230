"""The methods of the host's patcher that must act differently on quantized layers.

They are shadowed on the instance, never on the class, and hold the patcher weakly: the host frees models by reference
count. `clone()` makes a new instance, so the ON_CLONE callback shadows that one as well.
"""

from __future__ import annotations

import weakref

import comfy.utils
import torch

from .operations import QuantizedLinear


def shadow(patcher) -> None:
    """Spare a patcher work whose result is thrown away, and a save that would write nonsense.

    Merging: the host would dequantize every patched layer and multiply the LoRA, once per change of LoRA or hook, and
    hand the result to `set_weight`, which drops it. The LoRA runs as a branch.
    Saving: the host would write the packed buffer under the shape of the dense weight.
    """
    this = weakref.ref(patcher)

    def patch_weight_to_device(key, device_to=None, inplace_update=False, return_weight=False, **kwargs):
        host, wanted = this(), return_weight or kwargs.get("force_cast")
        if not wanted and _is_quantized(host.model, key):
            return None
        return type(host).patch_weight_to_device(
            host, key, device_to, inplace_update, return_weight, **kwargs
        )

    def patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs):
        host = this()
        if not _is_quantized(host.model, key):
            type(host).patch_hook_weight_to_device(host, hooks, combined_patches, key, *args, **kwargs)

    patcher.patch_weight_to_device = patch_weight_to_device
    patcher.patch_hook_weight_to_device = patch_hook_weight_to_device
    patcher.state_dict_for_saving = patcher.model_state_dict_for_saving = refuse_saving


def refuse_saving(*_, **__) -> None:
    """Say that there is nothing to save. Raises ValueError."""
    raise ValueError(
        "A 4-bit SVDQuant model cannot be saved by ComfyUI's save nodes, which expect 16-bit weights. "
        "Copy its file, or convert it with `tools/svdquant convert`."
    )


def _is_quantized(model: torch.nn.Module, key: str) -> bool:
    path, _, name = key.rpartition(".")
    if name != "weight" or not path:
        return False
    layer = comfy.utils.get_attr(model, path)
    return isinstance(layer, QuantizedLinear) and layer.quantized
