"""ComfyUI's own nodes that change how a model runs, one by one: they do to a 4-bit model what they do to its twin."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from svdquant_nodes.tests.inside_host import small
from svdquant_nodes.tests.inside_host.twins import conditioning, error, sample
from svdquant_nodes.tests.tolerances import assert_close

DOWNSCALE = dict(block_number=4, downscale_factor=2.0, start_percent=0.0, end_percent=1.0)
DOWNSCALE |= dict(downscale_after_skip=True, downscale_method="bicubic", upscale_method="bicubic")
CACHE = dict(reuse_threshold=0.5, start_percent=0.0, end_percent=1.0, verbose=False)
SKIP = dict(scale=2.0, start_percent=0.0, end_percent=1.0, double_layers="0", single_layers="1")
SDXL = {  # node -> its module, and what it is given beside the model
    "PatchModelAddDownscale": ("model_downscale", DOWNSCALE),
    "PerturbedAttentionGuidance": ("pag", dict(scale=3.0)),
    "SelfAttentionGuidance": ("sag", dict(scale=0.5, blur_sigma=2.0)),
    "RescaleCFG": ("model_advanced", dict(multiplier=0.7)),
    "FreSca": ("fresca", dict(scale_low=1.0, scale_high=1.25, freq_cutoff=2)),
    "LazyCacheNode": ("easycache", CACHE),
}
SCALED = ("UNetSelfAttentionMultiply", "UNetCrossAttentionMultiply")  # patches that scale weights and biases
FLUX = {
    "NAGuidance": ("nag", dict(nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)),
    "SkipLayerGuidanceDiT": ("slg", SKIP),
    "ScaleROPE": ("rope", dict(scale_x=1.5, shift_x=0.5, scale_y=1.0, shift_y=0.0, scale_t=1.0, shift_t=0.0)),
    "EasyCacheNode": ("easycache", CACHE),
    "TCFG": ("tcfg", {}),
    "APG": ("apg", dict(eta=0.5, norm_threshold=2.0, momentum=0.0)),
    "CFGZeroStar": ("cfg", {}),
}


def patched(name, module, inputs, model):
    node = getattr(import_module(f"comfy_extras.nodes_{module}"), name)
    if hasattr(node, "execute"):
        return node.execute(model, **inputs).args[0]
    return getattr(node(), node.FUNCTION)(model, **inputs)[0]


def compare(name, module, inputs, both, draw, tolerance="host_twin"):
    ours, theirs = (draw(patched(name, module, inputs, m)) for m in (both.quantized, both.dense))
    assert error(theirs, draw(both.dense)) > 1e-3
    assert_close(ours, theirs, tolerance)


@cache
def sdxl():
    with TemporaryDirectory() as folder:
        return small.make("sdxl", Path(folder))


@pytest.mark.parametrize("name", SDXL)
def test_on_sdxl(name):
    compare(name, *SDXL[name], sdxl(), lambda model: small.sample("sdxl", model, 3, cfg=3.0))


@pytest.mark.parametrize("name", SCALED)
def test_scaled_attention(name):
    """Biases of a 4-bit model have 16 bits, as the file has them, and are rounded to those again."""
    multiply = dict(q=1.1, k=0.9, v=1.2, out=0.8)
    draw = partial(small.sample, "sdxl", steps=3, cfg=3.0)
    compare(name, "attention_multiply", multiply, sdxl(), draw, "host_dense_branch")


@pytest.mark.parametrize("name", FLUX)
def test_on_flux(twins, name):
    both = dict(positive=conditioning(3), negative=conditioning(4), cfg=3.0, steps=4)
    compare(name, *FLUX[name], twins, lambda model: sample(model, **both))
