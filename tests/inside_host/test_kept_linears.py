"""Linears that a user, or a size to keep, leaves in 16 bits in a family that has a published layout."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import pytest
from safetensors.torch import save_file

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.quantizer import recipes, stream
from svdquant_nodes.tests.inside_host.test_other_families import check_weights
from svdquant_nodes.tests.small_models import SMALL, detecting, random_weights


@pytest.mark.parametrize("form", ["published", "mixed"])
@pytest.mark.parametrize("family", ["qwen-image", "z-image"])
def test_linears_kept_in_16_bits_come_back_as_they_were(family, form, tmp_path, monkeypatch):
    """One that is fused, one that is not: by name in the published layout, or as a size to keep would choose."""
    monkeypatch.setattr(recipes, "INSTANT_ROUNDS", 1)
    source, kept = random_weights(SMALL[family].model()), ("*to_qkv", "*net.2")
    save_file(source, tmp_path / "source.safetensors")
    model = open_source(tmp_path / "source.safetensors")
    overrides = tuple((pattern, "plain") for pattern in kept)
    plan = make_plan(model, rank=16, overrides=overrides if form == "published" else ())
    if form == "mixed":
        plan = plan.mixing(
            replace(job, precision="plain") if any(map(partial(fnmatchcase, job.name), kept)) else job
            for job in plan.jobs
        )
    stream.quantize(plan, tmp_path / "made.safetensors", stream.Settings("instant"))
    assert not any(
        name.endswith(("to_qkv", "net.2")) for name in open_checkpoint(tmp_path / "made.safetensors").info
    )
    with detecting():
        check_weights(load_model(tmp_path / "made.safetensors"), source)
