"""LoRAs as a user has them: through the API, from stock loaders, chained, and as hooks on one conditioning."""

from __future__ import annotations

import math

import pytest

from svdquant_nodes.tests.host.test_demo import DEMO, NODE, demo, picture, psnr
from svdquant_nodes.tools.host.client import PromptFailed

LORA = DEMO[NODE["SVDQuantApplyLora"]]["inputs"]["lora_name"]
MODEL, SAMPLE = NODE["SVDQuantLoadModel"], NODE["SVDQuantSample"]


def without_lora(**changes):
    """The demo prompt with the sampler on the bare model."""
    prompt = demo(**changes)
    del prompt[NODE["SVDQuantApplyLora"]]
    prompt[SAMPLE]["inputs"]["model"] = [MODEL, 0]
    return prompt


def chained(*strengths):
    """Stock loaders in a row."""
    prompt, last = without_lora(), MODEL
    for i, strength in enumerate(strengths):
        inputs = {"lora_name": LORA, "strength_model": strength, "model": [last, 0]}
        last = f"lora{i}"
        prompt[last] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    prompt[SAMPLE]["inputs"]["model"] = [last, 0]
    return prompt


def hooked(strength, *conditionings, keyframes=()):
    """A LoRA hook, with keyframes (strength, start), on some of the sampler's conditionings."""
    prompt, hooks, last = without_lora(), "hook", None
    hook = {"lora_name": LORA, "strength_model": strength}
    prompt[hooks] = {"class_type": "CreateHookLoraModelOnly", "inputs": hook}
    for i, (by, start) in enumerate(keyframes):
        inputs = {"strength_mult": by, "start_percent": start} | ({"prev_hook_kf": [last, 0]} if last else {})
        last = f"keyframe{i}"
        prompt[last] = {"class_type": "CreateHookKeyframe", "inputs": inputs}
    if last:
        inputs = {"hooks": [hooks, 0], "hook_kf": [last, 0]}
        hooks = "keyframed"
        prompt[hooks] = {"class_type": "SetHookKeyframes", "inputs": inputs}
    for name in conditionings:
        inputs = {"cond_NEW": prompt[SAMPLE]["inputs"][name], "hooks": [hooks, 0]}
        inputs |= {"strength": 1.0, "set_cond_area": "default"}
        prompt[f"{name}-hooked"] = {"class_type": "ConditioningSetProperties", "inputs": inputs}
        prompt[SAMPLE]["inputs"][name] = [f"{name}-hooked", 0]
    return prompt


@pytest.fixture(scope="module")
def bare(comfy):
    return picture(comfy, without_lora())


@pytest.fixture(scope="module")
def whole(comfy):
    """The LoRA at strength 1 from one stock loader."""
    return picture(comfy, chained(1.0))


def test_two_chained_stock_loaders_add_up(comfy, bare, whole):
    assert psnr(whole, bare) < 20
    assert psnr(picture(comfy, chained(0.4, 0.6)), whole) > 45


def test_the_opposite_strength_takes_a_lora_back(comfy, bare):
    assert psnr(picture(comfy, chained(1.0, -1.0)), bare) > 45


def test_a_hook_on_both_conditionings_is_the_lora(comfy, whole):
    assert psnr(picture(comfy, hooked(1.0, "positive", "negative")), whole) > 45


def test_a_hook_on_one_conditioning_is_neither(comfy, bare, whole):
    one = picture(comfy, hooked(1.0, "positive"))
    assert psnr(one, whole) < 40
    assert psnr(one, bare) < 40


def test_keyframes_switch_a_hook(comfy, bare, whole):
    both = ("positive", "negative")
    off = picture(comfy, hooked(1.0, *both, keyframes=[(0.0, 0.0)]))
    halfway = picture(comfy, hooked(1.0, *both, keyframes=[(1.0, 0.0), (0.0, 0.5)]))
    assert psnr(off, bare) > 45
    assert psnr(halfway, whole) < 40 and psnr(halfway, bare) < 40


def test_after_hooks_the_model_is_as_before(comfy, bare):
    picture(comfy, hooked(1.0, "positive"))
    again = without_lora(SaveImage={"filename_prefix": "after-hooks"})
    assert psnr(picture(comfy, again), bare) == math.inf


def test_the_report_of_apply_lora(comfy):
    prompt = demo(
        SVDQuantApplyLora={"strength": 0.75, "more": "1", "more.lora_name_2": LORA, "more.strength_2": 0.5}
    )
    (text,) = comfy.client.run(prompt).outputs[NODE["SVDQuantApplyLora"]]["text"]
    line = f"{LORA} at {{}}: LoRA, kohya naming; 12 layers of 36 tensors, rank 96 in all, 0.2 MB; exact"
    assert text.splitlines() == [line.format("0.75"), line.format("0.5")]
    assert line.format("0.75") in comfy.server.log_text()


@pytest.mark.parametrize("more", ["9", 1], ids=["too-many", "a-number"])
def test_a_number_of_loras_that_no_option_is(comfy, more):
    prompt = demo(SVDQuantApplyLora={"more": more, "more.lora_name_2": LORA, "more.strength_2": 0.5})
    with pytest.raises(
        PromptFailed, match=f'more: expected "0" to "4" further LoRAs, in quotes, got {more!r}'
    ):
        comfy.client.run(prompt)


@pytest.mark.parametrize("more", ["0", "1", None], ids=["none", "one", "left-out"])
def test_a_lora_beyond_the_number_is_named(comfy, more):
    given = {} if more is None else {"more": more}
    given |= {
        f"more.{name}": value for name, value in (("lora_name_2", LORA), ("strength_2", 0.5)) if more == "1"
    }
    prompt = demo(SVDQuantApplyLora=given | {"more.lora_name_3": LORA, "more.strength_3": 0.5})
    with pytest.raises(PromptFailed, match=rf'more\.lora_name_3: .*with "more": "{more or 0}"'):
        comfy.client.run(prompt)
