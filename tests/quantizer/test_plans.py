"""Plans: which rectangle of which source linear every stored linear is, and where centring folds means away."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan, pays
from svdquant_nodes.svdquant.quantizer import jobs
from svdquant_nodes.svdquant.quantizer.statistics import Statistics
from svdquant_nodes.tests.quantizer import tiny


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("model") / "tiny.safetensors", tiny.flux())
    return make_plan(open_source(path), rank=16, centred=True)


def job(plan, name):
    return next(one for one in plan.jobs if one.name == name)


def test_single_blocks_are_cut_as_published_files_cut_them(plan):
    single = "single_transformer_blocks.0."
    assert job(plan, single + "qkv_proj").rows == (0, 384)
    assert job(plan, single + "mlp_fc1").rows == (384, None)
    out, fc2 = job(plan, single + "out_proj"), job(plan, single + "mlp_fc2")
    assert (out.columns, out.has_bias, out.after_gelu) == ((0, 128), False, False)
    assert (fc2.columns, fc2.has_bias, fc2.after_gelu) == ((128, None), True, True)
    assert job(plan, single + "norm.linear").chunks == 3


def test_the_cuts_of_a_source_linear_tile_it(plan):
    for source in {one.source for one in plan.jobs}:
        cuts = [plan.source.cut(one)[0] for one in plan.jobs if one.source == source]
        assert sum(cut.numel() for cut in cuts) == plan.source.tensors[f"{source}.weight"].numel()


def test_a_mean_that_is_folded_away_leaves_the_outputs_as_they_were(plan):
    """v's bias less mu, and W mu in the bias behind: softmax rows sum to one, so the block's output stays."""
    seen = Statistics(tokens=32)
    for name in dict.fromkeys(one.source for one in plan.jobs):
        k = plan.source.shapes[f"{name}.weight"][1]
        seen.see(name, torch.randn(64, k, generator=torch.Generator().manual_seed(k)) + 0.5)
    qkv, out = (job(plan, f"single_transformer_blocks.0.{name}") for name in ("qkv_proj", "out_proj"))
    _, bias = plan.source.cut(qkv)
    mean = seen["single_blocks.0.linear2"].mean[:128]
    folded = jobs.fold(bias, qkv, seen)
    torch.testing.assert_close(folded[256:], bias[256:] - mean)
    assert torch.equal(folded[:256], bias[:256])
    assert torch.equal(jobs.center_of(out, seen, "cpu"), mean)


def test_shifts_of_a_modulation_lose_what_their_readers_are_centred_by(plan):
    seen = Statistics(tokens=32)
    for name in dict.fromkeys(one.source for one in plan.jobs):
        seen.see(name, torch.ones(8, plan.source.shapes[f"{name}.weight"][1]))
    modulation = job(plan, "transformer_blocks.0.norm1.linear")
    _, bias = plan.source.cut(modulation)
    taken = (bias - jobs.fold(bias, modulation, seen)).unflatten(0, (6, -1)).mean(1)
    assert taken.tolist() == pytest.approx([1, 0, 0, 1, 0, 0], abs=1e-5)


def test_both_streams_share_the_mean_of_attention(plan):
    image, text = (job(plan, f"transformer_blocks.0.out_proj{end}") for end in ("", "_context"))
    assert image.center == text.center == "double_blocks.0.img_attn.proj"
    inputs = {
        fold.input
        for end in ("", "_context")
        for fold in job(plan, f"transformer_blocks.0.qkv_proj{end}").folds
    }
    assert inputs == {image.center}


def test_not_centred_by_default(tmp_path):
    path = tiny.write(tmp_path / "tiny.safetensors", tiny.flux())
    assert all(one.center is None and not one.folds for one in make_plan(open_source(path), rank=16).jobs)


def test_chroma_in_diffusers_names_is_chroma_and_not_a_broken_flux(tmp_path):
    flux = tiny.flux()
    own = tiny.chroma(flux)
    plans = [
        make_plan(open_source(tiny.write(tmp_path / f"{i}.safetensors", tensors)), rank=16)
        for i, tensors in enumerate((own, tiny.diffusers_chroma(own, flux)))
    ]
    assert {plan.family for plan in plans} == {"model"}
    assert sorted(job.name for job in plans[0].jobs) == sorted(job.name for job in plans[1].jobs)
    for job in plans[0].jobs:
        assert all(torch.equal(a, b) for a, b in zip(*(plan.source.cut(job) for plan in plans), strict=True))


PAYS = {
    "a-block's-linear": ("blocks.3.attn.qkv", (384, 128), True),
    "sdxl-attention": ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", (640, 640), True),
    "outside-blocks": ("img_in", (3072, 64), False),
    "small": ("blocks.3.gate", (16, 128), False),
    "width-no-group-divides": ("blocks.3.fc", (512, 136), False),
    "time-embedding": ("input_blocks.1.0.emb_layers.1", (640, 1280), False),
    "pixart-modulation": ("t_block.1", (6912, 1152), False),
}


@pytest.mark.parametrize(("name", "shape", "expected"), PAYS.values(), ids=PAYS)
def test_what_pays(name, shape, expected):
    assert pays(name, shape, "int4") is expected
