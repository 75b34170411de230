"""The host's bypass LoRA loaders, put right on quantized layers.

They wrap `forward` of each layer instead of patching its weight. On a quantized layer an ordinary patch already runs
beside the weight, so the wrapping gains nothing, and it has two faults: a second bypass loader replaces the first
one's LoRA, and parts of fused layers (q, k and v of diffusers files) are dropped before anything of ours is asked.
The first is repaired here: what the loader would wrap around quantized layers becomes ordinary patches, which stack.
The second cannot be seen from here, so it is said.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any

from comfy.patcher_extension import PatcherInjection

from ..operations import QuantizedLinear

BYPASS = "bypass_lora"  # the key of the host's loaders
BECOME_PATCHES = (
    "lora",
    "loha",
    "lokr",
)  # the rest transform a layer's output or input, for which there is no patch
log = logging.getLogger("svdquant-nodes")


def watch(patcher) -> None:
    """Take part when the host's bypass loader sets its injections on this patcher."""
    this = weakref.ref(patcher)

    def set_injections(key: str, injections: list[PatcherInjection]) -> None:
        host = this()
        if key == BYPASS:
            injections = _adopt(host, injections)
        type(host).set_injections(host, key, injections)

    patcher.set_injections = set_injections


def _adopt(patcher, injections: list[PatcherInjection]) -> list[PatcherInjection]:
    log.warning(
        "SVDQuant: ComfyUI's bypass LoRA loader drops the q, k and v parts of LoRAs in diffusers naming. On a 4-bit "
        "model its ordinary LoRA loader does not touch the weights either: use that one, or SVDQuant Apply LoRA."
    )
    for injection in injections:
        manager = inspect.getclosurevars(injection.inject).nonlocals.get("self")
        if hasattr(manager, "hooks"):
            _take_over(patcher, manager)
    earlier = patcher.injections.get(BYPASS, [])
    return [_together([*earlier, *injections])] if earlier else injections


def _take_over(patcher, manager: Any) -> None:
    """Turn the hooks on quantized layers into patches of the patcher."""
    names = {id(module): name for name, module in patcher.model.named_modules()}
    for hook in list(manager.hooks):
        is_ours = isinstance(hook.module, QuantizedLinear) and hook.module.quantized
        if is_ours and getattr(hook.adapter, "name", "") in BECOME_PATCHES:
            patcher.add_patches({f"{names[id(hook.module)]}.weight": hook.adapter}, hook.multiplier)
            manager.hooks.remove(hook)


def _together(injections: list[PatcherInjection]) -> PatcherInjection:
    """Several as one, ejected in the opposite order: each wrapped the `forward` that the one before it left."""

    def inject(patcher) -> None:
        for injection in injections:
            injection.inject(patcher)

    def eject(patcher) -> None:
        for injection in reversed(injections):
            injection.eject(patcher)

    return PatcherInjection(inject=inject, eject=eject)
