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
  ON_CLONE          the clone is shadowed and watched too (../patcher.py, budget.py, bypass.py)

How one patch becomes branches is in joining.py, where branches are kept in residence.py.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping

from comfy.patcher_extension import CallbacksMP

from ..operations import quantized_linears
from ..patcher import shadow
from . import bypass, joining
from .budget import count_branches
from .joining import Joined
from .patches import Patch

KEY = "svdquant"
log = logging.getLogger("svdquant-nodes")


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
        (CallbacksMP.ON_CLONE, _accompany_clone),
    ):
        patcher.add_callback_with_key(event, KEY, callback)
    _accompany(patcher)


def _accompany(patcher) -> None:
    shadow(patcher)
    count_branches(patcher)
    bypass.watch(patcher)
    if patcher.is_clip:
        _follow_hooks(patcher)


def _follow_hooks(patcher) -> None:
    """A text encoder's hooks: the host switches their keyframes without the callback that models get."""
    this = weakref.ref(patcher)

    def patch_hooks(hooks) -> None:
        host = this()
        type(host).patch_hooks(host, hooks)
        set_branches(host, hooks)

    patcher.patch_hooks = patch_hooks


def _accompany_clone(patcher, clone) -> None:
    # The model's own: the host gives a clone what model_size() says, which counts the original's branches too.
    clone.size = patcher.size
    _accompany(clone)


def set_branches(patcher, hooks=None) -> None:
    """Give every quantized layer the branches that the patcher's patches and those of `hooks` mean for it."""
    hooked: Mapping[str, list[Patch]] = patcher.get_combined_hook_patches(hooks) if hooks is not None else {}
    fresh: dict[str, Joined] = {}
    for key, layer in quantized_linears(patcher.model):
        patches = [*patcher.patches.get(key, ()), *hooked.get(key, ())]
        joined, is_new = joining.recall(layer, key, patches, patcher.load_device)
        if is_new:
            fresh[key] = joined
        layer.residence.take(joined.branches, layer.weight.device, patcher.load_device)
        layer.wrappers = tuple(patcher.weight_wrapper_patches.get(key, ()))
    _say(fresh)


def _say(joined: Mapping[str, Joined]) -> None:
    """What is worth a line in the log: dense differences, truncations, patches that do not fit."""
    dense = [j.dense for j in joined.values() if j.dense]
    if dense:
        size = sum(dense) / 2**20
        log.info(
            "LoRA: %.0f MB of whole differences on %d layers, for what is not low-rank", size, len(dense)
        )
    errors = [j.error for j in joined.values() if j.error]
    if errors:
        log.info("LoRA: low rank on %d layers, largest relative error %.1e", len(errors), max(errors))
    misfits = [(key, j.misfit) for key, j in joined.items() if j.misfit]
    if misfits:
        text = "LoRA: skipped on %d layers, which it does not fit, such as %s: %s"
        log.warning(text, len(misfits), *misfits[0])


def clear_branches(patcher) -> None:
    """Drop every branch, so that its tensors can be freed."""
    for _, layer in quantized_linears(patcher.model):
        layer.residence.clear()
        joining.forget(layer)


def _drop_stale_hooks(patcher) -> None:
    if patcher.hook_patches and patcher.current_hooks is None:
        set_branches(patcher)
