"""SDXL and PixArt-Sigma calibrated with the node, quantized by a calibrated recipe or to an error, loaded, sampled."""

from __future__ import annotations

import comfy.sd
import pytest
from safetensors.torch import save_file

from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.nodes.calibrate import SVDQuantCalibrate
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.quantizer import choices, stream
from svdquant_nodes.svdquant.quantizer.sensitivity import Limit
from svdquant_nodes.tests.inside_host import small
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.small_models import SMALL, detecting

RECIPES = {"sdxl": "fast", "pixart-sigma": "best"}
LINEARS = {"sdxl": 4, "pixart-sigma": 2}  # quantized; the rest stays in 16 bits, for the sake of time

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", RECIPES)
def test_calibrated_recipes_draw_nearer_than_instant(family, tmp_path):
    made_of, source = SMALL[family], tmp_path / "source.safetensors"
    with detecting():
        save_file(made_of.tensors(), source)
        exact = comfy.sd.load_diffusion_model(str(source))
        watched, seen = SVDQuantCalibrate.execute(exact, 128, 0).args
        before = small.sample(family, watched, batch=2, cfg=2.0)
        opened = open_source(source)
        some = tuple((job.name, "int4") for job in make_plan(opened, rank=16).jobs[: LINEARS[family]])
        plan = make_plan(opened, rank=16, overrides=(("*", "plain"), *some))

        def distance(plan, recipe, name):
            errors = stream.quantize(plan, tmp_path / name, stream.Settings(recipe), statistics=seen)
            made = load_model(tmp_path / name)
            assert errors.keys() == {job.name for job in plan.jobs}
            assert next(quantized_linears(made.model))
            return error(small.sample(family, made, batch=2, cfg=2.0), before)

        near = distance(plan, RECIPES[family], "near.safetensors")
        instant = distance(plan, "instant", "instant.safetensors")
        assert 0 < near < instant < 0.35
        settings, target = stream.Settings("instant"), tmp_path / "mixed.safetensors"
        decision = choices.decide(
            plan, Limit(error=0.09), ("int4", "plain"), target, settings, statistics=seen
        )
        assert 0 < distance(decision.plan, "instant", target.name) < instant
