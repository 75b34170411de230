"""A 16-bit T5 file becomes one like the published; the shell command does the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.families import resolve
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.quantizer import text_encoder
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tools.pack import ROOT

D, FF, HEADS, WORDS = 128, 256, 2, 64
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
LINEARS = {f"0.SelfAttention.{x}": (D, D) for x in "qkvo"}
LINEARS |= {
    "1.DenseReluDense.wi_0": (FF, D),
    "1.DenseReluDense.wi_1": (FF, D),
    "1.DenseReluDense.wo": (D, FF),
}


def t5(dtype=torch.float16):
    """Two blocks, as ComfyUI's t5xxl files name them."""
    tensors = {
        "shared.weight": layers.random(WORDS, D, seed=1, dtype=dtype),
        BIAS: layers.random(32, HEADS, seed=2, dtype=dtype),
    }
    tensors["encoder.final_layer_norm.weight"] = layers.random(D, seed=3, dtype=dtype)
    for block in (0, 1):
        prefix = f"encoder.block.{block}.layer."
        for i, (name, (n, k)) in enumerate(LINEARS.items()):
            tensors[f"{prefix}{name}.weight"] = layers.random(
                n, k, seed=10 * block + i, dtype=dtype, scale=k**-0.5
            )
        tensors |= {
            f"{prefix}{i}.layer_norm.weight": layers.random(D, seed=30 + i, dtype=dtype) for i in (0, 1)
        }
    return tensors


def scaled_fp8(tensors):
    """The form of t5xxl_fp8_e4m3fn_scaled: linears in fp8 with a scale beside them."""
    made = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    for name, t in tensors.items():
        if text_encoder.LINEAR.fullmatch(name):
            scale = t.float().abs().max() / 448
            made[name] = (t.float() / scale).to(torch.float8_e4m3fn)
            made[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
        else:
            made[name] = t
    return made


def raw_fp8(tensors):
    """The form of t5xxl_fp8_e4m3fn: everything cast."""
    return {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}


SOURCES = {
    "fp16": lambda t: t,
    "fp32": lambda t: {n: x.float() for n, x in t.items()},
    "fp8": raw_fp8,
    "scaled-fp8": scaled_fp8,
}


@pytest.mark.parametrize("form", SOURCES)
def test_file_holds_the_encoder(tmp_path, form):
    path = made.save(tmp_path / "t5.safetensors", SOURCES[form](t5()))
    source, target, seen = open_source(path), tmp_path / "out.safetensors", []
    assert text_encoder.is_t5(source)
    errors = text_encoder.quantize(source, target, progress=lambda *told: seen.append(told))
    checkpoint = open_checkpoint(target)
    assert checkpoint.dialect == "nunchaku_t5" and checkpoint.warnings == ()
    assert (
        set(checkpoint.info)
        == set(errors)
        == {f"encoder.block.{b}.layer.{n}" for b in (0, 1) for n in LINEARS}
    )
    for name, error in errors.items():
        want, got = source.tensors[f"{name}.weight"].float(), reference.dequantize(checkpoint.layers[name])
        assert error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-3) and error < 0.1
        assert checkpoint.info[name].spec.group == 128
    plain = {
        n: t.to(torch.float16) for n, t in source.tensors.items() if not text_encoder.LINEAR.fullmatch(n)
    }
    plain["encoder.embed_tokens.weight"] = plain["shared.weight"]
    assert made.same_tensors(checkpoint.plain, plain)
    assert [told[:3] for told in seen] == [(name, i, 14) for i, name in enumerate(errors, 1)]
    assert resolve(checkpoint).kind == "text encoder"


def test_header_is_that_of_the_published_file(tmp_path):
    source = open_source(made.save(tmp_path / "t5.safetensors", t5()))
    text_encoder.quantize(source, tmp_path / "out.safetensors")
    metadata = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert metadata["model_class"] == "NunchakuT5EncoderModel"
    config = json.loads(metadata["config"])
    want = dict(vocab_size=WORDS, d_model=D, d_kv=64, d_ff=FF, num_layers=2, num_heads=HEADS)
    assert {name: config[name] for name in want} == want


def test_a_table_under_its_other_name_only(tmp_path):
    tensors = t5()
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    text_encoder.quantize(
        open_source(made.save(tmp_path / "t5.safetensors", tensors)), tmp_path / "out.safetensors"
    )
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["shared.weight"], tensors["encoder.embed_tokens.weight"])
    assert torch.equal(written["shared.weight"], written["encoder.embed_tokens.weight"])


V = "encoder.block.1.layer.0.SelfAttention.v.weight"
REFUSED = {
    "nan": ({V: torch.full((D, D), torch.nan).half()}, r"encoder\.block\.1.*\.v: weight: expected finite"),
    "narrow": ({V: torch.ones(D, 96).half()}, r"SelfAttention\.v: expected rows in fours and columns in groups of 128"),
    "nan-norm": ({"encoder.final_layer_norm.weight": torch.full((D,), torch.nan)}, r"layer_norm\.weight: expected fin"),
    "umt5": ({BIAS.replace(".0.", ".1.", 1): torch.ones(32, HEADS)}, "expected a T5 encoder of version 1.1, got UMT5"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, changes, message):
    source = open_source(made.save(tmp_path / "t5.safetensors", t5() | changes))
    with pytest.raises(ValueError, match=message):
        text_encoder.is_t5(source)
        text_encoder.quantize(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_other_models_are_no_t5(tmp_path):
    path = made.save(tmp_path / "m.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.ones(8, 8)})
    assert not text_encoder.is_t5(open_source(path))


def svdquant(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "svdquant"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_from_a_shell(tmp_path):
    path, target = made.save(tmp_path / "t5.safetensors", t5()), tmp_path / "out.safetensors"
    done = svdquant("quantize", path, target)
    assert done.returncode == 0, done.stderr
    assert "t5.safetensors: T5, 14 linears" in done.stdout and "14/14" in done.stdout
    assert "mean error of weights" in done.stdout
    shown = svdquant("inspect", target).stdout
    assert shown.startswith("out.safetensors: nunchaku_t5, T5\n") and "awq g128" in shown
    again = svdquant("quantize", path, tmp_path / "b.safetensors", "--precision", "nvfp4")
    assert again.returncode == 2 and "--precision nvfp4: a text encoder is quantized from" in again.stderr
