"""Every family once through everything: a small 16-bit model is watched, quantized, loaded and sampled beside it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters import families
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.quantizing import calibration
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.quantizer import recipes, stream
from svdquant_nodes.svdquant.quantizer.statistics import Statistics
from svdquant_nodes.tests.inside_host import small, twins
from svdquant_nodes.tests.inside_host.test_other_families import check_weights
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.loaders import full_size
from svdquant_nodes.tests.small_models import SMALL, detecting
from svdquant_nodes.tests.tolerances import assert_close

BOTH = ("pixart-sigma", "qwen-image", "z-image", "flux2")
CASES = ["sdxl-int4", "chroma-int4", "wan-int4", *(f"{name}-{p}" for name in BOTH for p in ("int4", "nvfp4"))]


@dataclass(frozen=True)
class Made:
    """A small model, quantized.

    family  in SMALL
    source  the 16-bit tensors
    path    the 4-bit file
    before  what the 16-bit model draws
    errors  of every quantized linear's output
    """

    family: str
    source: dict[str, Tensor]
    path: Path
    before: Tensor
    errors: dict[str, float]


def sample(family, model, control=None):
    """Batch 2 with guidance."""
    return small.sample(family, model, batch=2, cfg=2.0, control=control)


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    family, _, precision = request.param.rpartition("-")
    folder, made_of = tmp_path_factory.mktemp("model"), SMALL[family]
    with torch.inference_mode(), detecting(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "INSTANT_ROUNDS", 1)
        source = made_of.tensors()
        save_file(source, folder / "source.safetensors")
        exact = comfy.sd.load_diffusion_model(str(folder / "source.safetensors"))
        seen = Statistics(64)
        before = sample(family, calibration.recording(exact, seen.see))
        plan = make_plan(open_source(folder / "source.safetensors"), precision=precision, rank=16)
        path = folder / "made.safetensors"
        errors = stream.quantize(plan, path, stream.Settings("instant"), statistics=seen)
        yield Made(family, source, path, before, errors)


def test_the_file_is_what_is_published(made):
    checkpoint = open_checkpoint(made.path)
    family = families.resolve(checkpoint)
    assert checkpoint.dialect == SMALL[made.family].layout
    if checkpoint.dialect == "natural":
        assert family is families.native.FAMILY
        return
    fp4 = any(layer.spec.format == "nvfp4" for layer in checkpoint.info.values())
    wanted = templates(getattr(full_size, made.family.replace("-", "_"))(**({"fp4": True} if fp4 else {})))
    wanted |= {
        name.replace(".wcscales", ".wtscale") for name in wanted
    }  # we have one scale where q, k and v had three
    assert family.published and checkpoint.metadata["model_class"].startswith("Nunchaku")
    assert len(wanted) > 30 and wanted >= templates(checkpoint.stored)


def templates(names):
    """Names without block numbers."""
    return {re.sub(r"\.\d+(?=\.)", ".{}", name) for name in names}


def test_every_weight_is_in_its_place(made):
    check_weights(load_model(made.path), made.source, SMALL[made.family].linears)


def test_it_draws_what_16_bits_draw(made):
    """As far off as its layers are: their errors add to one stream as noise does, and guidance of 2 doubles them."""
    drawn = sample(made.family, load_model(made.path))
    layers = math.sqrt(sum(e**2 for e in made.errors.values()) / len(made.errors))
    assert 0.02 < layers < 0.2
    found = error(drawn, made.before)
    assert 0.1 * layers < found < 3 * layers


def test_with_exact_activations_it_is_the_hosts_own_model(made):
    both = twins.make(made.path)
    ours, theirs = (sample(made.family, model) for model in (both.quantized, both.dense))
    assert_close(ours, theirs, "host_twin")
