"""SDXL and PixArt-Sigma in ComfyUI's names: watched, quantized by the generic path, loaded, sampled."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters import calibration
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.adapters.plans import make_plan
from svdquant_nodes.svdquant.quantizer import stream
from svdquant_nodes.svdquant.quantizer.statistics import Statistics
from svdquant_nodes.tests.inside_host import published
from svdquant_nodes.tests.inside_host.test_other_families import SDXL, sample
from svdquant_nodes.tests.inside_host.twins import error


def sdxl():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    options = {k: list(v) if isinstance(v, list) else v for k, v in SDXL.items()}
    return UNetModel(**options, **published.META)


def pixart():
    from comfy.ldm.pixart.pixartms import PixArtMS

    return PixArtMS(depth=1, model_max_length=300, micro_condition=False, **published.META)


CASES = {  # the class; widths of its text and pooled text; an empty latent; linears
    "sdxl": (sdxl, 2048, 1280, torch.zeros(2, 4, 8, 8), 90),
    "pixart-sigma": (pixart, 4096, 0, torch.zeros(1, 4, 64, 64), 7),
}
# Tensors of the published files that the host's class has no place for.
UNUSED = {"pixart-sigma": {"pos_embed": torch.zeros(1, 32 * 32, 1152, dtype=torch.bfloat16)}}


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_generic_path(family, tmp_path):
    build, width, pooled, latent, count = CASES[family]
    tensors = published.random_weights(build()) | UNUSED.get(family, {})
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    exact = comfy.sd.load_diffusion_model(str(source))
    plan, seen = make_plan(open_source(source), rank=16), Statistics(64)
    before = sample(calibration.recording(exact, seen.see), width, pooled, latent)
    assert {job.source for job in plan.jobs} <= set(seen)
    assert len(plan.jobs) == count
    target = tmp_path / "made.safetensors"
    stream.quantize(plan, target, stream.Settings("instant"), statistics=seen)
    assert open_checkpoint(target).dialect == "natural"
    made = load_model(target)
    assert len(list(quantized_linears(made.model))) == count
    assert error(sample(made, width, pooled, latent), before) < 0.35  # W4A4 of random weights, two steps
