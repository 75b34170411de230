"""The demo model calibrated, quantized, loaded and compared, with the nodes a user would place."""

from __future__ import annotations

import re

import comfy.model_management
import comfy.sd
import folder_paths
import nodes
import pytest
import torch

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.nodes.calibrate import SVDQuantCalibrate
from svdquant_nodes.nodes.compare import SVDQuantCompare
from svdquant_nodes.nodes.quantize import SVDQuantQuantize
from svdquant_nodes.svdquant.adapters import demo, folders
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.quantizing import quantize as host
from svdquant_nodes.svdquant.quantizer.statistics import load as load_statistics
from svdquant_nodes.tests.inside_host.twins import DEMO_BF16, DEMO_INT4, sample


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The host's model folder, empty but for the demo's own behind it."""
    own = tmp_path / folders.MODELS
    own.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.MODELS, ([str(own)], {".safetensors"}))
    folders.register_demo()
    return own


@pytest.fixture
def model():
    return comfy.sd.load_diffusion_model(str(DEMO_BF16))


def prompt(text):
    context, pooled = demo.encode_prompt(text)
    return [[context, {"pooled_output": pooled}]]


POSITIVE, NOTHING = prompt("a big yellow star at the center on a navy background"), prompt("")
LATENT = {"samples": torch.zeros(4, 16, 8, 8)}


def draw(model, steps=4):
    (latent,) = nodes.common_ksampler(model, 1, steps, 2.0, "euler", "simple", POSITIVE, NOTHING, LATENT)
    return latent


def quantize(**options):
    defaults = dict(source=DEMO_BF16.name, file_name="made", precision="int4", rank=16, recipe="auto")
    return SVDQuantQuantize.execute(**(defaults | dict(center=False, seed=0) | options)).args


def test_calibrate_sample_quantize_load(models, model):
    before = draw(model)
    watched, statistics = SVDQuantCalibrate.execute(model, 512, 0).args
    assert torch.equal(draw(watched)["samples"], before["samples"])
    path, report = quantize(statistics=statistics, after=before, recipe="fast", save_statistics=True)
    assert path == str(models / "made.safetensors")
    assert "mean error of outputs on held-out tokens" in report
    assert open_checkpoint(path).dialect == "nunchaku_v1"
    assert "single_blocks.1.linear2" in load_statistics(models / "made.statistics.safetensors")
    after = draw(load_model(path))["samples"]
    assert torch.dist(after, before["samples"]) < 0.1 * before["samples"].norm()


def test_watching_leaves_the_model_as_it_was(model):
    before = sample(model)
    watched, statistics = SVDQuantCalibrate.execute(model, 64, 0).args
    sample(watched)
    seen = len(statistics)
    assert seen == 8 + 4 + 2 + 2  # of every linear in a block, modulations included
    assert torch.equal(sample(model), before)
    hooks = [m for m in model.model.diffusion_model.modules() if m._forward_pre_hooks]
    assert hooks == []


def test_hooks_go_when_the_model_fails(model, monkeypatch):
    watched, _ = SVDQuantCalibrate.execute(model, 64, 0).args

    def fail(*args, **kwargs):
        raise RuntimeError("stopped in the middle")

    monkeypatch.setattr(type(model.model.diffusion_model.final_layer), "forward", fail)
    with pytest.raises(RuntimeError, match="stopped in the middle"):
        sample(watched)
    assert [m for m in model.model.diffusion_model.modules() if m._forward_pre_hooks] == []


def test_without_statistics_the_instant_recipe_runs(models):
    path, report = quantize(precision="nvfp4", file_name="folder/made.safetensors")
    assert path == str(models / "folder" / "made.safetensors")
    assert "mean error of weights" in report


def test_statistics_of_a_model_that_was_not_sampled(models, model):
    _, statistics = SVDQuantCalibrate.execute(model, 64, 0).args
    with pytest.raises(ValueError, match=r"statistics: expected what a sampled model read, got nothing"):
        quantize(statistics=statistics)


@pytest.mark.parametrize("name", ["", "sub/", "../made", "/made", "..\\made", "C:\\made", "what?"])
def test_names_that_lead_out_of_the_folder_or_that_some_systems_cannot_store(models, name):
    with pytest.raises(ValueError, match="expected a name inside diffusion_models"):
        quantize(file_name=name)
    assert list(models.iterdir()) == []


def test_either_slash_parts_folders(models):
    assert host.target("a b\\ü/made") == models / "a b" / "ü" / "made.safetensors"


def test_a_file_that_is_there_is_kept_above_all_the_source(models):
    source = models / "mine.safetensors"
    source.write_bytes(DEMO_BF16.read_bytes())
    with pytest.raises(ValueError, match=r"mine.safetensors: expected a new file, got one that is there"):
        quantize(source=source.name, file_name="mine")
    assert source.read_bytes() == DEMO_BF16.read_bytes()


def test_an_interrupt_leaves_no_file_and_the_next_run_goes_on(models, monkeypatch):
    with monkeypatch.context() as patch:
        calls = []

        def interrupt():
            calls.append(1)
            if len(calls) == 3:
                raise comfy.model_management.InterruptProcessingException

        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            quantize()
    assert [file.name for file in models.iterdir()] == [".made.safetensors.unfinished"]
    quantize()
    assert [file.name for file in models.iterdir()] == ["made.safetensors"]


@pytest.mark.parametrize(("where", "ours"), [("cuda:1", "cuda:1"), ("mps", "cpu"), ("xpu:0", "cpu")])
def test_recipes_run_where_all_they_need_is(monkeypatch, where, ours):
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device(where))
    assert host.device() == ours


def test_4_bit_models_are_not_calibrated(quantized):
    with pytest.raises(ValueError, match="calibration: expected a 16-bit model, got one in 4 bits"):
        SVDQuantCalibrate.execute(quantized, 64, 0)


def test_compare(model, quantized):
    settings = dict(seed=1, steps=8, cfg=2.0, guidance=3.5, sampler="euler", scheduler="simple")
    panels, report = SVDQuantCompare.execute(
        model, quantized, POSITIVE, LATENT, demo.load_vae(), negative=NOTHING, **settings
    ).args
    assert panels.shape == (4, 64, 3 * 64, 3)
    assert float(re.search(r"mean: PSNR (\S+) dB", report).group(1)) > 28
    errors = [float(e) for e in re.findall(r"output error (\S+) %", report)]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 30
    assert DEMO_INT4.is_file()


def test_a_file_of_many_ranks_and_16_bit_linears_loads_and_samples(models, model):
    """With room for some linears in 16 bits the mixed model is nearer to the original than one of rank 16 is."""
    watched, statistics = SVDQuantCalibrate.execute(model, 256, 0).args
    before = draw(watched)["samples"]
    path, report = quantize(statistics=statistics, recipe="fast", budget_mb=8)
    uniform, _ = quantize(statistics=statistics, recipe="fast", file_name="uniform")
    assert "linears (plain: 16 bits)" in report
    assert (models / "made.choices.json").is_file()
    checkpoint, exact = open_checkpoint(path), model.model.diffusion_model.state_dict()
    assert (models / "made.safetensors").stat().st_size <= 8 * 2**20
    assert len({layer.rank for layer in checkpoint.info.values()}) > 2
    made = load_model(path)
    plain = [name for name in checkpoint.plain_info if re.match(r"(double|single)_blocks\..*\.weight", name)]
    assert plain
    there = made.model.diffusion_model.state_dict()
    assert all(torch.equal(there[name], exact[name]) for name in plain)
    errors = [torch.dist(draw(one)["samples"], before).item() for one in (made, load_model(uniform))]
    assert errors[0] < 0.7 * errors[1]


def test_two_limits_are_refused(models):
    with pytest.raises(ValueError, match="budget_mb, error_percent: expected one of them, got both"):
        quantize(budget_mb=9, error_percent=5.0)
