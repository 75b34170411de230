"""tools/svdquant convert: every dialect into every one we write, cropped and marked where the family is known."""

from __future__ import annotations

import argparse

import pytest
import torch

from svdquant_nodes.loaders import natural
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.nunchaku_linear import V2, encode_linear
from svdquant_nodes.svdquant.adapters import convert
from svdquant_nodes.svdquant.adapters.families import Role
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.core.weights import GELU_SHIFT
from svdquant_nodes.tests import golden, layers
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tools.commands import convert as command

MINI = {name: golden.FOLDER / f"mini_flux_{name}.safetensors" for name in ("int4", "fp4")}


def run(source, target, dialect, *options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.main(parser.parse_args([str(source), str(target), "--to", dialect, *options])) == 0
    return open_checkpoint(target)


@pytest.fixture
def natural_file(tmp_path):
    """The toy FLUX in natural form, as the command writes it."""
    return run(MINI["int4"], tmp_path / "natural.safetensors", "natural")


def test_natural_marks_unsigned_layers_of_a_known_family(natural_file):
    shifted = {name for name, info in natural_file.info.items() if info.spec.act_shift == GELU_SHIFT}
    assert shifted == {
        "single_transformer_blocks.0.mlp_fc2",
        "transformer_blocks.0.mlp_fc2",
        "transformer_blocks.0.mlp_context_fc2",
    }


@pytest.mark.parametrize("name", MINI)
def test_nunchaku_to_natural_and_back(tmp_path, name):
    source = open_checkpoint(MINI[name])
    run(MINI[name], tmp_path / "a.safetensors", "natural")
    back = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "nunchaku")
    assert made.same_tensors(back.stored, source.stored) and back.metadata == source.metadata


def test_nunchaku_to_kitchen_to_natural(tmp_path, natural_file):
    kitchen = run(MINI["int4"], tmp_path / "kitchen.safetensors", "kitchen")
    assert kitchen.info["transformer_blocks.0.mlp_fc2"].spec.act_shift == GELU_SHIFT
    around = run(kitchen.path, tmp_path / "around.safetensors", "natural")
    assert made.same_tensors(around.stored, natural_file.stored)


def test_nunchaku_to_nunchaku_keeps_every_byte(tmp_path):
    tensors = made.layer("any.thing", "c5") | made.PLAIN  # smooth_orig is not smooth here
    made.save(tmp_path / "a.safetensors", tensors)
    assert made.same_tensors(
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "nunchaku").stored, tensors
    )


def test_unknown_family_passes_through_with_its_padding(tmp_path, capsys):
    made.save(tmp_path / "a.safetensors", made.layer("any.thing", "c2") | made.PLAIN)
    found = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "natural")
    assert (found.info["any.thing"].out_features, found.info["any.thing"].in_features) == (256, 256)
    assert made.same_tensors(found.plain, made.PLAIN)
    assert "family unknown" in capsys.readouterr().err


def test_known_family_is_cropped_and_padded_again(tmp_path, monkeypatch):
    """A family that knows true sizes: 192 x 256 stored as 256 x 256."""

    class Family:
        def roles(self, checkpoint):
            return {"any.thing": Role(out_features=192, in_features=256)}

    monkeypatch.setattr(convert, "resolve", lambda checkpoint: Family())
    tensors = made.layer("any.thing", "c2")
    made.save(tmp_path / "a.safetensors", tensors)
    found = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "natural")
    assert found.layers["any.thing"].codes.shape == (192, 128)
    logical = golden.case("svdq_int4_linear", "c2.logical")
    assert made.same(found.stored["any.thing.codes"], logical["q"])
    back = run(found.path, tmp_path / "c.safetensors", "nunchaku")
    assert made.same_tensors(back.stored, tensors)


def test_lite_becomes_v2(tmp_path):
    w = layers.random_linear("int4", 128, 128)
    tensors = {f"transformer_blocks.0.attn.to_q.{k}": t for k, t in encode_linear(w, V2).items()}
    lite = {name: t for name, t in tensors.items() if not name.endswith("_orig")}
    made.save(tmp_path / "lite.safetensors", lite)
    found = run(tmp_path / "lite.safetensors", tmp_path / "a.safetensors", "nunchaku")
    assert found.dialect == "nunchaku_v2" and made.same_tensors(found.stored, tensors)


def test_nvfp4_to_kitchen_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"mini_flux_fp4.safetensors: .* got NVFP4 .*kitchen has no NVFP4"):
        run(MINI["fp4"], tmp_path / "a.safetensors", "kitchen")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dialect", ["nunchaku", "kitchen"])
def test_a_text_encoder_is_no_set_of_modulations(tmp_path, dialect):
    source = tmp_path / "qwen3.safetensors"
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qvo"]
    norm = {"model.layers.0.self_attn.q_norm.weight": torch.ones(128)}
    natural.write(source, {name: layers.random_linear("awq", 128, 128) for name in names}, norm, {})
    with pytest.raises(
        ValueError, match=rf"qwen3.safetensors: .* got a text encoder \(Qwen3\), which {dialect} files"
    ):
        run(source, tmp_path / "a.safetensors", dialect)
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3.safetensors"]
    assert run(source, tmp_path / "b.safetensors", "natural").info.keys() == set(names)


def test_bad_layer_leaves_no_file(tmp_path):
    tensors = made.layer("x") | {"x.bias": torch.full((128,), float("nan"), dtype=torch.bfloat16)}
    made.save(tmp_path / "a.safetensors", made.layer("good") | tensors)
    with pytest.raises(ValueError, match=r"x.bias: expected finite numbers"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "natural")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_target_may_not_be_the_source(tmp_path):
    path = tmp_path / "a.safetensors"
    natural.write(path, {"x": layers.random_linear("int4", 128, 128)}, {}, {})
    with pytest.raises(ValueError, match=r"a.safetensors: expected a new file, got the source itself"):
        run(path, path, "nunchaku")


def test_target_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"got one that is there\. Name another, or add --overwrite"):
        run(MINI["int4"], tmp_path / "b.safetensors", "nunchaku")
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
    run(MINI["int4"], tmp_path / "b.safetensors", "nunchaku", "--overwrite")
    assert len(open_checkpoint(tmp_path / "b.safetensors").layers) == 15


def test_modulations_are_in_the_models_own_order_where_its_modules_run_them(tmp_path):
    name = "transformer_blocks.0.norm1.linear"
    source = open_checkpoint(MINI["int4"])
    kitchen = run(MINI["int4"], tmp_path / "kitchen.safetensors", "kitchen")
    engine, own = (file.layers[name] for file in (source, kitchen))
    d = engine.out_features // 6
    order = [j * 6 + s for s in range(6) for j in range(d)]
    assert torch.equal(own.codes, engine.codes[order])
    plus = torch.zeros(6, d)
    plus[[1, 4]] = 1
    assert torch.equal(own.bias.float(), engine.bias[order].float() - plus.flatten())


def test_a_signed_layer_is_made_unsigned_for_the_engine(tmp_path):
    """What follows a GELU computes the same: x - shift through the stored layer is x through the signed one."""
    names = [f"transformer_blocks.0.{name}" for name in ("norm1_context.linear", "ff.net.2")]
    signed = layers.random_linear("int4", 128, 256)
    kept = {names[0]: layers.random_linear("awq", 768, 128), names[1]: signed}
    lite = {f"{layer}.{k}": t for layer, w in kept.items() for k, t in encode_linear(w, V2).items()}
    made.save(tmp_path / "lite.safetensors", {n: t for n, t in lite.items() if not n.endswith("_orig")})
    found = run(tmp_path / "lite.safetensors", tmp_path / "a.safetensors", "natural").layers[names[1]]
    assert found.spec.act_shift == GELU_SHIFT
    assert torch.equal(found.codes, signed.codes)
    shift = torch.full((1, 256), GELU_SHIFT, dtype=torch.float64)
    dense = reference.residual(signed).double()
    wanted = signed.bias.double() - (shift @ dense.T)[0]
    assert (found.bias.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
