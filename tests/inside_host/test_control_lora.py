"""A control LoRA, whose ControlNet the host builds of the model's own weights, steers a 4-bit model as its twin."""

from __future__ import annotations

import comfy.controlnet
import pytest
import torch

from svdquant_nodes.tests.inside_host import loras, small
from svdquant_nodes.tests.inside_host.test_controlnet import HINT
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.small_controlnets import sdxl
from svdquant_nodes.tests.small_models import random_weights
from svdquant_nodes.tests.tolerances import assert_close

OWN = ("input_hint_block", "zero_convs", "middle_block_out")  # what the file has whole
LORA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"  # in the half that the ControlNet copies


def control_lora():
    """Rank 4 on every second matrix of random weights; a layer without one is the model's as it is."""
    tensors, draw = {"lora_controlnet": torch.zeros(0)}, torch.Generator().manual_seed(9)
    matrices = 0
    for name, weight in random_weights(sdxl()).items():
        module, _, end = name.rpartition(".")
        if name.startswith(OWN):
            tensors[name] = weight
        elif end == "weight" and weight.ndim > 1:
            matrices += 1
            if matrices % 2:
                width = weight[0].numel()
                tensors[f"{module}.up"] = torch.randn(len(weight), 4, generator=draw) * 0.1
                tensors[f"{module}.down"] = torch.randn(4, width, generator=draw) / width**0.5
    control = comfy.controlnet.load_controlnet_state_dict(tensors)
    assert isinstance(control, comfy.controlnet.ControlLora)
    return control.set_cond_hint(HINT, 0.5, (0.0, 1.0))


@pytest.fixture
def both(tmp_path):
    return small.make("sdxl", tmp_path)


def draw(model, control=None):
    return small.sample("sdxl", model, cfg=2.0, batch=2, control=control)


def test_it_steers_both_alike(both):
    ours, theirs = (draw(model, control_lora()) for model in (both.quantized, both.dense))
    assert error(theirs, draw(both.dense)) > 1e-2
    assert_close(ours, theirs, "host_twin")


def test_a_lora_on_the_model_is_in_the_controlnet_too(both):
    """As on a 16-bit model, where it is merged before the weights are copied; and gone when it is removed."""
    noise = torch.Generator().manual_seed(3)
    lora = {
        f"{LORA}.lora_up.weight": torch.randn(320, 4, generator=noise),
        f"{LORA}.lora_down.weight": torch.randn(4, 320, generator=noise) / 320**0.5,
    }
    before = draw(both.quantized, control_lora())
    ours, theirs = (draw(loras.stock(model, lora), control_lora()) for model in (both.quantized, both.dense))
    assert error(theirs, before) > 1e-3
    assert_close(ours, theirs, "host_twin")
    assert torch.equal(draw(both.quantized, control_lora()), before)
