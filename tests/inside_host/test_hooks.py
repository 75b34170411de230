"""LoRA hooks on a conditioning: switched per conditioning and per step, gone afterwards."""

from __future__ import annotations

import comfy.hooks
import pytest
import torch

from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import conditioning, error, sample
from svdquant_nodes.tests.tolerances import assert_close


def _hooks(keyframes: bool):
    group = comfy.hooks.create_hook_lora(loras.kohya(), 1.0, 0)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
        group.set_keyframes_on_hooks(frames)
    return group


def _sample(model, keyframes: bool = False, first: str = "positive"):
    hooked, free = conditioning(3, hooks=_hooks(keyframes)), conditioning(4)
    positive, negative = (hooked, free) if first == "positive" else (free, hooked)
    return sample(model.clone(), positive=positive, negative=negative, cfg=2.0, steps=4)


@pytest.mark.parametrize("keyframes", [False, True], ids=["constant", "keyframes"])
@pytest.mark.parametrize("first", ["positive", "negative"])
def test_hook_on_one_conditioning(twins, first, keyframes):
    expected = _sample(twins.dense, keyframes, first)
    unhooked = sample(twins.dense, positive=conditioning(3), negative=conditioning(4), cfg=2.0, steps=4)
    assert error(expected, unhooked) > 0.02
    assert_close(_sample(twins.quantized, keyframes, first), expected, "host_twin")


def test_twice_then_none(quantized):
    before = sample(quantized)
    once, again = _sample(quantized), _sample(quantized)
    assert torch.equal(once, again)
    assert torch.equal(sample(quantized), before)


def test_hook_on_top_of_a_lora(twins):
    stacked = [loras.stock(m, loras.diffusers(), 0.5) for m in (twins.quantized, twins.dense)]
    ours, theirs = map(_sample, stacked)
    assert_close(ours, theirs, "host_twin")
