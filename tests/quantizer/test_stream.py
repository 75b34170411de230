"""A model file becomes a 4-bit file that our loader reads back as the same model; a stopped run goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.conventions import straighten
from svdquant_nodes.svdquant.adapters.families import resolve
from svdquant_nodes.svdquant.adapters.family import apply_role, assemble
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.quantizer import stream
from svdquant_nodes.svdquant.quantizer.statistics import Statistics, save
from svdquant_nodes.tests.quantizer import tiny
from svdquant_nodes.tools.pack import ROOT


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny.safetensors", tiny.flux())


def quantize(path, target, recipe="instant", *, statistics=None, progress=None, **options):
    plan = make_plan(open_source(path), **({"rank": 16} | options))
    return stream.quantize(plan, target, stream.Settings(recipe), statistics=statistics, progress=progress)


def dense(path):
    """The host's tensors that a 4-bit FLUX file stands for."""
    checkpoint = open_checkpoint(path)
    mapped = resolve(checkpoint).map_names(checkpoint)
    tensors = {}
    for host, pieces in mapped.linears.items():
        stored = [apply_role(checkpoint.layers[name], role) for name, role in pieces]
        stored = [
            straighten(w, r.splits) if r.splits else w for w, (_, r) in zip(stored, pieces, strict=True)
        ]
        weights = [reference.dequantize(w) for w in stored]
        tensors[f"{host}.weight"] = torch.cat(weights, dim=0 if mapped.axes[host] == "rows" else 1)
        plain = [
            torch.zeros(len(w.codes)) if w.bias is None else w.bias.float() + reference.shift_compensation(w)
            for w in stored
        ]
        tensors[f"{host}.bias"] = (
            torch.cat(plain) if mapped.axes[host] == "rows" else torch.stack(plain).sum(0)
        )
        assemble(stored, mapped.axes[host])
    assert mapped.left_over == ()
    return tensors | {host: plain.read(checkpoint.plain) for host, plain in mapped.plain.items()}


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_file_holds_the_source_model(source, tmp_path, precision):
    quantize(source, tmp_path / "out.safetensors", precision=precision)
    made, exact = dense(tmp_path / "out.safetensors"), load_file(source)
    assert set(made) == set(exact)
    for name, want in exact.items():
        error = torch.dist(made[name].float(), want.float()) / want.float().norm()
        limit = 0.12 if name.endswith("weight") and want.ndim == 2 else 0.06
        assert error < limit, (name, error)
        if "_blocks." not in name or name.endswith("scale"):
            assert torch.equal(made[name], want), name


def test_diffusers_names_give_the_same_file(source, tmp_path):
    other = tiny.write(tmp_path / "diffusers.safetensors", tiny.diffusers(load_file(source)))
    for path, name in ((source, "a"), (other, "b")):
        quantize(path, tmp_path / f"{name}.safetensors")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert set(first) == set(second)
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


def test_metadata_tells_sizes_format_and_errors(source, tmp_path):
    errors = quantize(source, tmp_path / "out.safetensors")
    metadata = open_checkpoint(tmp_path / "out.safetensors").metadata
    config = json.loads(metadata["comfy_config"])["model_config"]
    assert (config["depth"], config["depth_single_blocks"], config["hidden_size"]) == (1, 1, 128)
    assert json.loads(metadata["quantization_config"])["rank"] == 16
    told = json.loads(metadata["svdquant"])
    assert told["recipe"] == "instant"
    assert told["relative_error"] == {name: round(e, 5) for name, e in errors.items()}
    assert len(errors) == 12


def test_calibrated_recipes_use_the_statistics_and_need_them(source, tmp_path):
    plan, seen = make_plan(open_source(source), rank=16), Statistics(tokens=256)
    for job in plan.jobs:
        k = plan.source.shapes[f"{job.source}.weight"][1]
        for call in range(12 if job.source not in seen else 0):
            x = torch.randn(40, k, generator=torch.Generator().manual_seed(call))
            seen.see(job.source, torch.nn.functional.gelu(x).bfloat16())
    target = tmp_path / "out.safetensors"
    calibrated = quantize(source, target, "fast", statistics=seen)
    assert max(calibrated.values()) < 0.2
    seen.see("single_blocks.0.linear1", torch.full((1, 128), torch.nan))
    with pytest.raises(ValueError, match=r"statistics of single_blocks\.0\.linear1: expected finite inputs"):
        quantize(source, target, "fast", statistics=seen)
    del seen._recorders["single_blocks.0.linear2"]
    with pytest.raises(
        ValueError, match=r"recipe fast: expected statistics of every linear, got none of single"
    ):
        quantize(source, target, "fast", statistics=seen)


class Stop(Exception):
    """What an interrupted run sees."""


def stop_after(count):
    def progress(name, done, total, error):
        if done == count:
            raise Stop

    return progress


def test_a_stopped_run_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    target, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    with pytest.raises(Stop):
        quantize(source, target, progress=stop_after(5))
    assert not target.exists()
    made = []
    real = stream.make
    monkeypatch.setattr(stream, "make", lambda s, job, *rest: made.append(job.name) or real(s, job, *rest))
    quantize(source, target)
    assert len(made) == 15 - 5
    quantize(source, whole)
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "whole.safetensors"]


def test_another_setting_does_not_go_on_with_old_linears(source, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out.safetensors", progress=stop_after(5))
    quantize(source, tmp_path / "out.safetensors", rank=32)
    info = open_checkpoint(tmp_path / "out.safetensors").info
    assert {layer.rank for layer in info.values() if layer.spec.format == "int4"} == {32}


BAD = {
    "nan-weight": (
        lambda t: t["double_blocks.0.img_attn.qkv.weight"].__setitem__((3, 4), float("nan")),
        r"bad\.safetensors: double_blocks\.0\.img_attn\.qkv: weight: expected finite numbers",
    ),
    "already-quantized": (
        lambda t: t.update({"a.qweight": torch.zeros(128, 64, dtype=torch.int8)}),
        "in 4 bits already",
    ),
    "other-quantization": (
        lambda t: t.update({"a.weight": torch.zeros(128, 64, dtype=torch.int8)}),
        r"a\.weight: expected a 16-bit or fp8 weight, got torch\.int8",
    ),
    "lora": (
        lambda t: t.clear() or t.update({f"x.{i}.lora_A.weight": torch.zeros(128, 128) for i in range(2)}),
        "expected a 16-bit model, got a LoRA",
    ),
    "t5": (
        lambda t: (
            t.clear()
            or t.update(
                {f"encoder.block.{i}.layer.0.SelfAttention.q.weight": torch.zeros(128, 128) for i in (0, 1)}
            )
        ),
        r"got a text encoder\. Quantize it with SVDQuant Quantize Text Encoder",
    ),
    "clip": (
        lambda t: (
            t.clear() or t.update({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(128, 128)})
        ),
        "expected a diffusion model, got a text encoder",
    ),
    "no-model": (
        lambda t: t.clear() or t.update(a=torch.zeros(3)),
        "expected the linears of a diffusion model",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_sources_are_refused_and_leave_no_file(tmp_path, change, message):
    tensors = tiny.flux()
    change(tensors)
    path = tiny.write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        quantize(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


BAD_SETTINGS = {
    "rank": (dict(rank=17), "rank: expected a multiple of 16 up to 256, got 17"),
    "precision": (dict(precision="int3"), "precision: expected int4 or nvfp4"),
    "half-a-linear-in-16-bit": (
        dict(overrides=(("*.mlp_fc1", "plain"),)),
        r"qkv_proj: expected plain, as of single.*\.mlp_fc1, .*one linear of the model \(single_blocks\.0\.linear1\)",
    ),
    "modulation-in-int4": (dict(overrides=(("*norm1.linear", "int4"),)), "expected awq or plain for a modul"),
    "everything-in-16-bit": (dict(overrides=(("*", "plain"),)), "expected linears to quantize, got none"),
    "unknown-override": (dict(overrides=(("*", "int2"),)), "expected int4, nvfp4, awq or plain, got 'int2'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(source, tmp_path / "out.safetensors", **options)


MIXED = {  # what is asked for, and the linears of the model that are in 16 bits then
    "16-bit": ((("transformer_blocks.0.qkv_proj", "plain"),), {"double_blocks.0.img_attn.qkv"}),
    "16-bit-modulation": ((("*norm1.linear", "plain"),), {"double_blocks.0.img_mod.lin"}),
    "16-bit-in-two": (
        (("single*.qkv_proj", "plain"), ("single*.mlp_fc1", "plain")),
        {"single_blocks.0.linear1"},
    ),
    "awq": ((("*.mlp_fc2", "awq"),), set()),
}


@pytest.mark.parametrize(("overrides", "kept"), MIXED.values(), ids=MIXED)
def test_forms_that_nunchakus_layout_has_no_place_for_are_written_naturally(
    source, tmp_path, overrides, kept
):
    target, exact = tmp_path / "out.safetensors", load_file(source)
    quantize(source, target, overrides=overrides)
    checkpoint = open_checkpoint(target)
    assert (checkpoint.dialect, resolve(checkpoint).name) == ("natural", "FLUX.1")
    made = dense(target)
    for name, tensor in exact.items():
        if name.endswith("weight"):
            missed = (made[name].float() - tensor.float()).norm() / tensor.float().norm()
            inside = re.match(r"(double|single)_blocks", name) and name.removesuffix(".weight") not in kept
            assert 0 < missed < 0.2 if inside else missed == 0, name


def test_target_in_no_folder(source, tmp_path):
    with pytest.raises(ValueError, match="expected a folder"):
        quantize(source, tmp_path / "none" / "out.safetensors")


def test_prefix_text_encoder_and_fp8_scale(tmp_path):
    tensors = {f"model.diffusion_model.{name}": t for name, t in tiny.flux().items()}
    key = "model.diffusion_model.double_blocks.0.img_attn.qkv"
    exact = tensors[f"{key}.weight"]
    tensors[f"{key}.weight"] = (exact.float() / 0.01).to(torch.float8_e4m3fn)
    tensors[f"{key}.scale_weight"] = torch.tensor(0.01)
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(4, 4)
    opened = open_source(tiny.write(tmp_path / "all.safetensors", tensors))
    assert "1 tensors of text encoders, VAE" in opened.notes[0]
    assert set(opened.shapes) == set(tiny.flux())
    weight, _ = opened.linear("double_blocks.0.img_attn.qkv")
    assert torch.dist(weight, exact.float()) < 0.04 * exact.float().norm()


def test_any_other_model_keeps_its_names(tmp_path):
    tensors = {
        "blocks.0.attn.qkv.weight": torch.randn(384, 128),
        "blocks.0.attn.qkv.bias": torch.randn(384),
        "blocks.0.small.weight": torch.randn(8, 128),
        "blocks.0.odd.weight": torch.randn(256, 136),
        "x_embedder.weight": torch.randn(512, 128),
        "final_layer.linear.weight": torch.randn(512, 128),
    }
    path = tiny.write(tmp_path / "model.safetensors", tensors)
    quantize(path, tmp_path / "out.safetensors")
    made = open_checkpoint(tmp_path / "out.safetensors")
    assert set(made.info) == {"blocks.0.attn.qkv"}
    assert set(made.plain) == set(tensors) - {"blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"}
    assert resolve(made).name == "ComfyUI model"
    quantize(path, tmp_path / "kept.safetensors", overrides=(("*.qkv", "awq"),))
    assert open_checkpoint(tmp_path / "kept.safetensors").info["blocks.0.attn.qkv"].spec.format == "awq"


def svdquant(*arguments, command="quantize"):
    line = [sys.executable, str(ROOT / "tools" / "svdquant"), command, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_command_line(source, tmp_path):
    done = svdquant(source, tmp_path / "out.safetensors", "--rank", "16", "--precision", "nvfp4")
    assert done.returncode == 0, done.stderr
    assert "FLUX.1, 15 linears, recipe instant" in done.stdout
    assert "mean error of weights" in done.stdout
    assert len(open_checkpoint(tmp_path / "out.safetensors").info) == 15


def test_command_line_refuses_in_one_sentence(source, tmp_path):
    save(tmp_path / "stats.safetensors", _one_sample())
    done = svdquant(source, tmp_path / "out.safetensors", "--stats", tmp_path / "stats.safetensors")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe best: expected statistics of every linear")
    done = svdquant(source, source)
    assert done.returncode == 2
    assert "got the source itself" in done.stderr


def test_compare_tells_the_error_that_quantizing_told(source, tmp_path):
    plan, seen = make_plan(open_source(source), rank=16), Statistics(tokens=64)
    for job in plan.jobs:
        k = plan.source.shapes[f"{job.source}.weight"][1]
        for call in range(12):
            x = torch.randn(20, k, generator=torch.Generator().manual_seed(call))
            seen.see(job.source, torch.nn.functional.gelu(x).bfloat16())
    save(tmp_path / "stats.safetensors", seen)
    made = tmp_path / "out.safetensors"
    told = quantize(source, made, "svdquant", statistics=seen)
    done = svdquant(source, made, "--stats", tmp_path / "stats.safetensors", "--json", command="compare")
    assert done.returncode == 0, done.stderr
    found = {one["name"]: one["error"] for one in json.loads(done.stdout)}
    assert set(found) == set(told)
    assert all(abs(found[name] - told[name]) < 0.003 for name in told)
    weights = svdquant(source, made, command="compare").stdout
    assert "15 linears, worst first; mean error of weights" in weights


def _one_sample():
    seen = Statistics(tokens=8)
    seen.see("double_blocks.0.img_attn.qkv", torch.randn(16, 128))
    return seen
