"""Nunchaku checkpoints whole: the toy FLUX files against their logical tensors, folders, names, metadata."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from svdquant_nodes.loaders import natural, nunchaku
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.core.int4 import unpack_signed, unpack_unsigned
from svdquant_nodes.svdquant.core.weights import GELU_SHIFT
from svdquant_nodes.tests import golden, layers
from svdquant_nodes.tests.loaders import made

FILES = {
    "int4": golden.FOLDER / "mini_flux_int4.safetensors",
    "fp4": golden.FOLDER / "mini_flux_fp4.safetensors",
}
LOGICAL = json.loads((golden.FOLDER / "mini_flux_logical.json").read_text())
HIDDEN = 128

# logical module -> stored layer and which rows of it
SINGLE = {
    **{f"attn.to_{x}": ("qkv_proj", i) for i, x in enumerate("qkv")},
    "proj_mlp": ("mlp_fc1", None),
    "proj_out.linears.0": ("out_proj", None),
    "proj_out.linears.1": ("mlp_fc2", None),
    "norm.linear": ("norm.linear", 3),
}
DOUBLE = {
    **{f"attn.to_{x}": ("qkv_proj", i) for i, x in enumerate("qkv")},
    **{f"attn.add_{x}_proj": ("qkv_proj_context", i) for i, x in enumerate("qkv")},
    "attn.to_out.0": ("out_proj", None),
    "attn.to_add_out": ("out_proj_context", None),
    "ff.net.0.proj": ("mlp_fc1", None),
    "ff.net.2": ("mlp_fc2", None),
    "ff_context.net.0.proj": ("mlp_context_fc1", None),
    "ff_context.net.2": ("mlp_context_fc2", None),
    "norm1.linear": ("norm1.linear", 6),
    "norm1_context.linear": ("norm1_context.linear", 6),
}


def sha256(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def comparable() -> list[tuple[str, str, str]]:
    """Logical tensors a file can be asked for.

    Not `branch_a`, of which it holds the rounded quotient by `smooth`, and not a bias into which a shift or the
    modulation's +1 was rounded; the single linears of test_nunchaku_linear hold those.
    """
    found = []
    for precision, modules in LOGICAL.items():
        for module, fields in modules.items():
            folded = "shift" in fields or module.endswith(
                ("norm.linear", "norm1.linear", "norm1_context.linear")
            )
            found += [
                (precision, module, f) for f in fields if f != "branch_a" and not (f == "bias" and folded)
            ]
    return found


def stored(checkpoint, module: str, field: str) -> torch.Tensor:
    """The logical tensor as our reader gives it."""
    block, _, name = module.partition(".0.")
    if ".norm_" in module:
        return checkpoint.plain[f"{block}.0.{name.removeprefix('attn.')}.weight"]
    layer, part = (SINGLE if block.startswith("single") else DOUBLE)[name]
    w = checkpoint.layers[f"{block}.0.{layer}"]
    if "norm" in layer:
        straight = torch.arange(w.out_features).reshape(HIDDEN, part).T.reshape(-1)
        return unpack_unsigned(w.codes[straight]).to(torch.int8) - 7 if field == "q" else w.scales[straight]
    rows = slice(None) if part is None else slice(part * HIDDEN, (part + 1) * HIDDEN)
    second = w.second_scale if part is None or w.second_scale is None else w.second_scale[rows].unique()
    values = {"scale": w.scales[rows], "subscale": w.scales[rows], "smooth": w.smooth, "branch_b": w.up}
    values |= {"q": unpack_signed(w.codes[rows]), "code": unpack_unsigned(w.codes[rows]), "scale0": second}
    return {**values, "bias": w.bias[rows], "shift": torch.tensor([GELU_SHIFT]).bfloat16()}[field]


@pytest.fixture(scope="module", params=FILES)
def checkpoint(request):
    return open_checkpoint(FILES[request.param])


@pytest.mark.parametrize("precision, module, field", comparable(), ids="-".join)
def test_toy_checkpoint_holds_its_logical_tensors(precision, module, field):
    want = LOGICAL[precision][module][field]
    got = stored(open_checkpoint(FILES[precision]), module, field)
    assert list(got.shape) == want["shape"] and str(got.dtype) == f"torch.{want['dtype']}"
    assert sha256(got) == want["sha256"]


def test_toy_checkpoint_leaves_nothing_over(checkpoint):
    keys = {key for info in checkpoint.info.values() for key in info.keys.values()}
    assert keys | set(checkpoint.plain) == set(checkpoint.stored) and not keys & set(checkpoint.plain)
    assert checkpoint.dialect == "nunchaku_v1" and checkpoint.warnings == ()


def test_info_agrees_with_what_is_decoded(checkpoint):
    for name, info in checkpoint.info.items():
        w = checkpoint.layers[name]
        assert (w.spec, w.out_features, w.in_features, w.rank) == (
            info.spec,
            info.out_features,
            info.in_features,
            info.rank,
        )
        assert info.nbytes == sum(checkpoint.stored[key].nbytes for key in info.keys.values())


def test_unpublished_names_are_not_layers(checkpoint):
    with pytest.raises(KeyError):
        checkpoint.layers["no.such.layer"]
    assert "no.such.layer" not in checkpoint.layers


def rewrite(source, path, **options):
    nunchaku.write(path, source.layers, source.plain, source.metadata, **options)
    return open_checkpoint(path)


def test_nunchaku_to_natural_and_back_is_the_same_file(checkpoint, tmp_path):
    path = tmp_path / "natural.safetensors"
    natural.write(path, checkpoint.layers, checkpoint.plain, checkpoint.metadata)
    back = rewrite(open_checkpoint(path), tmp_path / "back.safetensors")
    assert made.same_tensors(back.stored, checkpoint.stored)
    assert back.metadata == checkpoint.metadata and back.warnings == ()


def test_v2_file(checkpoint, tmp_path):
    path = made.save(tmp_path / "v2.safetensors", made.as_v2(dict(checkpoint.stored)))
    v2 = open_checkpoint(path)
    assert v2.dialect == "nunchaku_v2"
    for name in checkpoint.layers:
        assert made.same_tensors(v2.layers[name].tensors(), checkpoint.layers[name].tensors())
    assert made.same_tensors(rewrite(v2, tmp_path / "b.safetensors", names=nunchaku.V2).stored, v2.stored)


@pytest.mark.parametrize(
    "metadata, names, want",
    [
        ({}, ["a.qkv_proj"], nunchaku.V1),
        ({}, ["a.img_mlp.net.2"], nunchaku.V2),
        ({"model_class": "NunchakuZImageTransformer2DModel"}, ["a"], nunchaku.V2),
        ({"model_class": "NunchakuSDXLUNet2DConditionModel"}, ["a.feed_forward.x"], nunchaku.V1),
    ],
    ids=["flux", "qwen-by-name", "z-image-by-class", "class-before-name"],
)
def test_names_follow_the_family(metadata, names, want):
    assert nunchaku.names_for(metadata, dict.fromkeys(names)) is want


def test_models_without_bias_get_none(tmp_path):
    weights = layers.random_linear("int4", 128, 128)
    tensors = {
        f"layers.0.feed_forward.net.2.{k}": t for k, t in nunchaku.encode_linear(weights, nunchaku.V2).items()
    }
    del tensors["layers.0.feed_forward.net.2.bias"]
    source = open_checkpoint(made.save(tmp_path / "z.safetensors", tensors))
    assert made.same_tensors(rewrite(source, tmp_path / "b.safetensors").stored, tensors)


CLASSES = {
    "flux": ("NunchakuFluxTransformer2dModel", True),
    "sdxl": ("NunchakuSDXLUNet2DConditionModel", False),
}


@pytest.mark.parametrize(("model", "has_zeros"), CLASSES.values(), ids=CLASSES)
def test_a_missing_bias_is_zeros_where_the_engine_reads_one(tmp_path, model, has_zeros):
    weights = replace(layers.random_linear("int4", 128, 128), bias=None)
    path = tmp_path / "a.safetensors"
    nunchaku.write(path, {"x": weights}, {}, {"model_class": model})
    bias = open_checkpoint(path).layers["x"].bias
    assert (bias is not None) == has_zeros and (bias is None or not bias.any())


def folder(path, source):
    path.mkdir()
    parts = {True: {}, False: {}}
    for name, tensor in source.stored.items():
        parts["transformer_blocks." in name][name] = tensor
    made.save(path / "transformer_blocks.safetensors", parts[True])
    made.save(path / "unquantized_layers.safetensors", parts[False])
    (path / "config.json").write_text(source.metadata["config"])
    (path / "comfy_config.json").write_text(source.metadata["comfy_config"])
    return path


@pytest.mark.parametrize("inside", ["", "transformer_blocks.safetensors", "unquantized_layers.safetensors"])
def test_folder_opens_whole_from_any_of_its_files(checkpoint, tmp_path, inside):
    found = open_checkpoint(folder(tmp_path / "svdq-flux", checkpoint) / inside)
    assert found.dialect == "nunchaku_folder" and found.path.name == "svdq-flux"
    assert made.same_tensors(found.stored, checkpoint.stored)
    assert found.metadata["config"] == checkpoint.metadata["config"]


def test_folder_becomes_one_file(checkpoint, tmp_path):
    nunchaku.copy(tmp_path / "one.safetensors", open_checkpoint(folder(tmp_path / "svdq-flux", checkpoint)))
    one = open_checkpoint(tmp_path / "one.safetensors")
    assert one.dialect == "nunchaku_v1" and one.warnings == ()
    assert made.same_tensors(one.stored, checkpoint.stored)
    assert json.loads(one.metadata["quantization_config"]) == json.loads(
        checkpoint.metadata["quantization_config"]
    )


@pytest.mark.parametrize("absent", nunchaku.FOLDER_FILES)
def test_half_a_folder(checkpoint, tmp_path, absent):
    path = folder(tmp_path / "svdq-flux", checkpoint)
    (path / absent).unlink()
    with pytest.raises(
        ValueError, match=f"svdq-flux: expected {absent} in .*, got none. Download the whole folder"
    ):
        open_checkpoint(path)


def with_metadata(tmp_path, **settings):
    metadata = {"quantization_config": json.dumps(settings)}
    return open_checkpoint(made.save(tmp_path / "a.safetensors", made.layer("x") | made.PLAIN, metadata))


def test_metadata_that_disagrees_is_a_warning_and_the_tensors_win(tmp_path):
    found = with_metadata(tmp_path, weight={"dtype": "fp4_e2m1_all"}, rank=128)
    assert found.info["x"].spec.format == "int4" and found.info["x"].rank == 16
    assert found.layers["x"].rank == 16
    assert len(found.warnings) == 2
    assert "weights are fp4_e2m1_all, the tensors are int4; tensors win" in found.warnings[0]
    assert "rank 128, the tensors have rank 16" in found.warnings[1]


def test_int4_metadata_over_fp4_tensors_is_a_warning(tmp_path):
    tensors = made.layer("x", "f0", "svdq_nvfp4_linear")
    metadata = {"quantization_config": json.dumps({"weight": {"dtype": "int4"}, "rank": 16})}
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors, metadata))
    assert found.layers["x"].spec.format == "nvfp4"
    assert found.warnings == ("metadata says weights are int4, the tensors are fp4_e2m1_all; tensors win.",)


@pytest.mark.parametrize(
    "text",
    [
        *("not json", "[]", "{}", "null", '{"weight": 5}', '{"weight": {"dtype": ["int4"]}, "rank": "16"}'),
        pytest.param("[" * 100_000, id="nested-deep"),
    ],
)
def test_useless_metadata_does_not_matter(tmp_path, text):
    path = made.save(tmp_path / "a.safetensors", made.layer("x"), {"quantization_config": text})
    assert open_checkpoint(path).layers["x"].rank == 16


def test_settings_that_tensors_do_not_show_are_carried_over(tmp_path):
    source = with_metadata(tmp_path, skip_refiners=True, rank=64)
    back = rewrite(source, tmp_path / "b.safetensors")
    settings = json.loads(back.metadata["quantization_config"])
    assert settings["skip_refiners"] is True and settings["rank"] == 16
