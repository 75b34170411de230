"""A 16-bit T5 becomes a file like the published, any other encoder a natural one; the shell command does the same."""

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
from svdquant_nodes.svdquant.adapters.families import resolve
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.quantizer import text_encoder
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tools.pack import ROOT

D, FF, HEADS, WORDS = 128, 256, 2, 64
LINEAR = re.compile(r".*\.(SelfAttention\.[qkvo]|DenseReluDense\.\w+|(q|k|v|o|gate|up|down)_proj)\.weight")
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
        if LINEAR.fullmatch(name):
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
    plain = {n: t.to(torch.float16) for n, t in source.tensors.items() if not LINEAR.fullmatch(n)}
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


# ---- any other encoder: the natural layout, under its own names ----


def decoder(linear=torch.bfloat16):
    """Two blocks of a Qwen2.5-VL: biases on q, k and v, a norm in fp32, an output head, a tower, and a tokenizer."""
    tensors = {
        f"{n}.weight": layers.random(WORDS, D, seed=5).bfloat16() for n in ("model.embed_tokens", "lm_head")
    }
    tensors["visual.blocks.0.attn.qkv.weight"] = layers.random(96, 32, seed=6).bfloat16()
    tensors["tekken_model"] = torch.arange(5, dtype=torch.uint8)
    for block in (0, 1):
        prefix = f"model.layers.{block}."
        for i, name in enumerate(DECODER):
            n, k = DECODER[name]
            tensors[f"{prefix}{name}.weight"] = layers.random(
                n, k, seed=10 * block + i, dtype=linear, scale=k**-0.5
            )
            if name[-6] in "qkv" and "attn" in name:
                tensors[f"{prefix}{name}.bias"] = layers.random(n, seed=40 + i).bfloat16()
        tensors[f"{prefix}post_attention_layernorm.weight"] = layers.random(D, seed=30 + block).float()
    return tensors


DECODER = {f"self_attn.{x}_proj": (D, D) for x in "qkvo"}
DECODER |= {"mlp.gate_proj": (FF, D), "mlp.up_proj": (FF, D), "mlp.down_proj": (D, FF)}


@pytest.mark.parametrize("form", SOURCES)
def test_a_decoder_keeps_what_is_not_quantized(tmp_path, form):
    source = open_source(made.save(tmp_path / "qwen.safetensors", SOURCES[form](decoder())))
    seen, target = [], tmp_path / "out.safetensors"
    errors = text_encoder.quantize(source, target, progress=lambda *told: seen.append(told))
    checkpoint = open_checkpoint(target)
    assert (checkpoint.dialect, resolve(checkpoint).name, checkpoint.warnings) == (
        "natural",
        "Qwen2.5-VL",
        (),
    )
    assert (
        set(errors)
        == set(checkpoint.info)
        == {f"model.layers.{b}.{name}" for b in (0, 1) for name in DECODER}
    )
    for name, error in errors.items():
        want, got = source.tensors[f"{name}.weight"].float(), reference.dequantize(checkpoint.layers[name])
        assert error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-3) and error < 0.1
        bias = checkpoint.layers[name].bias
        assert (
            bias is None
            if f"{name}.bias" not in source.shapes
            else made.same(bias, source.tensors[f"{name}.bias"])
        )
    plain = {n: t for n, t in source.tensors.items() if n.rpartition(".")[0] not in errors}
    assert len(plain) == 6 and made.same_tensors(checkpoint.plain, plain)
    assert [told[:3] for told in seen] == [(name, i, 14) for i, name in enumerate(errors, 1)]


def test_group(tmp_path):
    """A width that 128 does not divide takes 64; asked for, all do, and T5 leaves the published layout."""
    odd = decoder() | {"model.layers.0.mlp.down_proj.weight": layers.random(D, 192, seed=1)}
    source = open_source(made.save(tmp_path / "qwen.safetensors", odd))
    text_encoder.quantize(source, tmp_path / "a.safetensors")
    groups = {
        name: info.spec.group for name, info in open_checkpoint(tmp_path / "a.safetensors").info.items()
    }
    assert groups.pop("model.layers.0.mlp.down_proj") == 64 and set(groups.values()) == {128}
    source = open_source(made.save(tmp_path / "t5.safetensors", t5()))
    text_encoder.quantize(source, tmp_path / "b.safetensors", group=64)
    narrow = open_checkpoint(tmp_path / "b.safetensors")
    assert (narrow.dialect, resolve(narrow).name) == ("natural", "T5")
    assert {info.spec.group for info in narrow.info.values()} == {64}
    with pytest.raises(ValueError, match="group: expected 128 or 64, got 32"):
        text_encoder.quantize(source, tmp_path / "c.safetensors", group=32)


def umt5():
    return t5() | {
        BIAS.replace(".0.", ".1.", 1): torch.ones(32, HEADS).half(),
        "spiece_model": torch.ones(3).byte(),
    }


def old_t5():
    first, second = (f"encoder.block.{b}.layer.1.DenseReluDense" for b in (0, 1))
    without = {name: t for name, t in t5().items() if "wi_" not in name}
    return without | {f"{name}.wi.weight": layers.random(FF, D, seed=9).half() for name in (first, second)}


@pytest.mark.parametrize(("tensors", "name"), [(umt5, "UMT5"), (old_t5, "T5 1.0")], ids=["umt5", "t5-1.0"])
def test_relatives_of_t5(tmp_path, tensors, name):
    source = open_source(made.save(tmp_path / "t5.safetensors", tensors()))
    errors = text_encoder.quantize(source, tmp_path / "out.safetensors")
    checkpoint = open_checkpoint(tmp_path / "out.safetensors")
    assert (checkpoint.dialect, resolve(checkpoint).name) == ("natural", name)
    plain = {n: t for n, t in source.tensors.items() if n.removesuffix(".weight") not in errors}
    assert len(errors) == (14 if name == "UMT5" else 12) and made.same_tensors(checkpoint.plain, plain)


# ---- refused ----

V = "encoder.block.1.layer.0.SelfAttention.v.weight"
UP, TABLE = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
REFUSED = {
    "nan": (t5, {V: torch.full((D, D), torch.nan).half()}, r"encoder\.block\.1.*\.v: weight: expected finite"),
    "narrow": (t5, {V: torch.ones(D, 96).half()}, r"Attention\.v: expected rows in fours and columns in groups of 64"),
    "nan-norm": (t5, {"encoder.final_layer_norm.weight": torch.full((D,), torch.nan)}, r"norm\.weight: expected fin"),
    "too-large-for-fp16": (t5, {"shared.weight": torch.full((WORDS, D), 1e6)}, r"numbers within torch\.float16"),
    "decoder-nan": (decoder, {UP: torch.full((FF, D), torch.inf)}, r"up_proj: weight: expected finite"),
    "decoder-nan-table": (decoder, {TABLE: torch.full((WORDS, D), torch.nan)}, r"tokens\.weight: expected finite"),
    "decoder-narrow": (decoder, {UP: torch.ones(FF, 100)}, "up_proj: expected rows in fours and columns"),
    "clip": (dict, {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(8, 8)}, "one of T5 1.0, .*got CLIP-L"),
    "flux": (dict, {"double_blocks.0.img_attn.qkv.weight": torch.ones(8, 8)}, r"encoder \(T5 1.0, .*got none"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, model, changes, message):
    source = open_source(made.save(tmp_path / "model.safetensors", model() | changes))
    with pytest.raises(ValueError, match=f"^model.safetensors: .*{message}"):
        text_encoder.quantize(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


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
    again = ["quantize", made.save(tmp_path / "q.safetensors", decoder()), target, "--group", "64", "--quiet"]
    assert "expected a new file, got one that is there" in svdquant(*again).stderr
    done = svdquant(*again, "--overwrite")
    assert "q.safetensors: Qwen2.5-VL, 14 linears in int4 of group 64" in done.stdout, done.stderr
    again = svdquant("quantize", path, tmp_path / "b.safetensors", "--precision", "nvfp4")
    assert again.returncode == 2 and "--precision nvfp4: a text encoder is quantized from" in again.stderr
