"""The demo's own FLUX, word vectors and VAE against the host's class, sampler and stock nodes."""

from __future__ import annotations

import comfy.sd
import nodes
import pytest
import torch

from svdquant_nodes.svdquant.adapters import demo
from svdquant_nodes.tests.inside_host.twins import DEMO_BF16, sample
from svdquant_nodes.tests.tolerances import assert_close
from svdquant_nodes.tools.demo_model import flux, shapes

SCENE = shapes.Scene("star", "yellow", "navy", "center", "big")


@pytest.fixture(scope="module")
def host_model():
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(DEMO_BF16), model_options={"dtype": torch.float32})


@pytest.fixture(scope="module")
def vae():
    return demo.load_vae()


@pytest.mark.parametrize("size", [(8, 8), (4, 10)], ids=["square", "wide"])
def test_forward_equals_the_hosts_class(host_model, size):
    x, t = torch.randn(3, 16, *size), torch.tensor([0.05, 0.5, 1.0])
    context, pooled = (part.repeat(3, *[1] * (part.ndim - 1)) for part in demo.encode_prompt(SCENE.caption))
    theirs = host_model.model.diffusion_model(x, t, context, pooled)
    assert_close(flux.load(DEMO_BF16)(x, t, context, pooled), theirs, "demo_forward")


def test_host_samples_and_stock_node_decodes_the_scene(host_model, vae):
    positive, negative = (
        [[context, {"pooled_output": pooled}]]
        for context, pooled in map(demo.encode_prompt, (SCENE.caption, ""))
    )
    latent = sample(host_model, positive=positive, negative=negative, cfg=2.0, steps=20, seed=4)
    (image,) = nodes.VAEDecode().decode(vae, {"samples": latent})
    drawings = shapes.to_tensor([shapes.draw(scene) for scene in shapes.ALL_SCENES])
    nearest = (drawings - (image.movedim(-1, 1) * 2 - 1)).square().sum((1, 2, 3)).argmin()
    assert shapes.ALL_SCENES[nearest] == SCENE


def test_stock_encode_and_tiled_nodes(vae):
    image = (shapes.to_tensor([shapes.draw(SCENE)]).movedim(1, -1) + 1) / 2
    (latent,) = nodes.VAEEncode().encode(vae, image)
    (tiled,) = nodes.VAEEncodeTiled().encode(vae, image, 64, 16)
    assert torch.equal(tiled["samples"], latent["samples"])
    (decoded,) = nodes.VAEDecode().decode(vae, latent)
    (in_tiles,) = nodes.VAEDecodeTiled().decode(vae, latent, 64)
    assert torch.equal(in_tiles, decoded)
    assert decoded.shape == image.shape


def test_stock_inpainting_encode(vae):
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    (latent,) = nodes.VAEEncodeForInpaint().encode(vae, torch.rand(1, 64, 64, 3), mask)
    assert latent["samples"].shape == (1, 16, 8, 8)
