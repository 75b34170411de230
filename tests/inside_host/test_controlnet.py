"""A ControlNet of the host's own class steers a quantized model exactly as it steers its dense twin."""

from __future__ import annotations

import comfy.controlnet
import comfy.model_patcher
import pytest
import torch
from comfy_extras.nodes_model_patch import QwenImageDiffsynthControlnet, ZImageFunControlnet

from svdquant_nodes.tests import small_controlnets
from svdquant_nodes.tests.inside_host import small, twins
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.small_controlnets import CASES, LatentVAE
from svdquant_nodes.tests.small_models import detecting
from svdquant_nodes.tests.tolerances import assert_close

HINT = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def control_of(case):
    """Loaded by the host from a state dict of random weights, with its hint."""
    control = comfy.controlnet.load_controlnet_state_dict(small_controlnets.tensors(case))
    return control.set_cond_hint(HINT, 0.5, (0.0, 1.0), vae=LatentVAE() if case == "qwen-image" else None)


@pytest.mark.parametrize("case", CASES)
def test_a_controlnet_steers_both_alike(case, tmp_path, request):
    if case == "flux":
        both, control = request.getfixturevalue("twins"), control_of(case)

        def draw(model, **more):
            return twins.sample(model, positive=twins.conditioning(**more))
    else:
        both = small.make(case, tmp_path)
        with detecting():
            control = control_of(case)

        def draw(model, control=None):
            return small.sample(case, model, cfg=2.0, batch=2, control=control)

    ours, theirs = (draw(model, control=control) for model in (both.quantized, both.dense))
    assert error(theirs, draw(both.dense)) > 1e-2
    assert_close(ours, theirs, "host_twin")


def test_z_images_controlnet_which_is_a_patch_of_the_model(tmp_path):
    both, cpu = small.make("z-image", tmp_path), torch.device("cpu")
    control = comfy.model_patcher.CoreModelPatcher(small_controlnets.z_image(), cpu, cpu)

    def draw(model):
        patch = dict(vae=LatentVAE(video=False), image=HINT.movedim(1, -1), strength=0.5)
        (patched,) = ZImageFunControlnet().diffsynth_controlnet(model, control, **patch)
        return small.sample("z-image", patched, cfg=2.0, batch=2)

    ours, theirs = draw(both.quantized), draw(both.dense)
    assert error(theirs, small.sample("z-image", both.dense, cfg=2.0, batch=2)) > 1e-2
    assert_close(ours, theirs, "host_twin")


def test_qwen_images_blockwise_controlnet_which_is_a_patch_of_the_model(tmp_path):
    both, cpu = small.make("qwen-image", tmp_path), torch.device("cpu")
    control = comfy.model_patcher.CoreModelPatcher(small_controlnets.qwen_blockwise(), cpu, cpu)

    def draw(model):
        patch = dict(vae=LatentVAE(), image=HINT.movedim(1, -1), strength=0.5)
        (patched,) = QwenImageDiffsynthControlnet().diffsynth_controlnet(model, control, **patch)
        return small.sample("qwen-image", patched, cfg=2.0, batch=2)

    ours, theirs = draw(both.quantized), draw(both.dense)
    assert error(theirs, small.sample("qwen-image", both.dense, cfg=2.0, batch=2)) > 1e-2
    assert_close(ours, theirs, "host_twin")
