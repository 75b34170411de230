"""A ControlNet of the host's own class steers a quantized model exactly as it steers its dense twin."""

from __future__ import annotations

import json

import comfy.controlnet
import pytest
import torch
from safetensors import safe_open

from svdquant_nodes.tests.inside_host import published, small, twins
from svdquant_nodes.tests.inside_host.small import META, SDXL, SMALL
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.tolerances import assert_close

HINT = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


class LatentVAE:
    """Stands for the VAE that encodes a hint: four pixels to a latent of Qwen-Image's shape."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        smaller = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return smaller.repeat(1, 6, 1, 1)[:, :16].unsqueeze(2)


def sdxl():
    from comfy.cldm.cldm import ControlNet

    options = {k: list(v) if isinstance(v, list) else v for k, v in SDXL.items() if k != "out_channels"}
    options.pop("transformer_depth_output")
    return ControlNet(**options, hint_channels=3, **META), None


def qwen():
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

    return QwenImageControlNetModel(**SMALL["qwen-image"].options, **META), LatentVAE()


def flux():
    """For the demo model."""
    from comfy.ldm.flux.controlnet import ControlNetFlux

    with safe_open(twins.DEMO_INT4, "pt") as file:
        config = json.loads(file.metadata()["comfy_config"])["model_config"]
    kept = (
        "axes_dim",
        "context_in_dim",
        "hidden_size",
        "mlp_ratio",
        "num_heads",
        "out_channels",
        "patch_size",
    )
    options = {name: config[name] for name in (*kept, "qkv_bias", "theta", "vec_in_dim", "guidance_embed")}
    options |= dict(in_channels=16, depth=1, depth_single_blocks=1, txt_ids_dims=[])
    return ControlNetFlux(**options, **META), None


CASES = {"sdxl": sdxl, "qwen-image": qwen, "flux": flux}


def control_of(case):
    """Loaded by the host from a state dict of random weights, with its hint."""
    model, vae = CASES[case]()
    tensors = published.random_weights(model)
    if case == "flux":  # by this name the host knows the trainer whose files these are
        tensors = {n.removesuffix("weight") + "scale" if "_norm." in n else n: t for n, t in tensors.items()}
    control = comfy.controlnet.load_controlnet_state_dict(tensors)
    return control.set_cond_hint(HINT, 0.5, (0.0, 1.0), vae=vae)


@pytest.mark.parametrize("case", CASES)
def test_a_controlnet_steers_both_alike(case, tmp_path, request):
    if case == "flux":
        both, control = request.getfixturevalue("twins"), control_of(case)

        def draw(model, **more):
            return twins.sample(model, positive=twins.conditioning(**more))
    else:
        both = small.make(case, tmp_path)
        with small.detecting(SMALL[case]):
            control = control_of(case)

        def draw(model, control=None):
            return small.sample(case, model, cfg=2.0, batch=2, control=control)

    ours, theirs = (draw(model, control=control) for model in (both.quantized, both.dense))
    assert error(theirs, draw(both.dense)) > 1e-2
    assert_close(ours, theirs, "host_twin")
