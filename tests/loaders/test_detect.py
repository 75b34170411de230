"""What a path turns out to be, and layers that do not hold together."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.tests import golden
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tests.loaders.test_kitchen import json_tensor

HALF = torch.ones(4, 4, dtype=torch.bfloat16)
NOT_OURS = {
    "16-bit-model": ({"double_blocks.0.img_mlp.0.weight": HALF}, r"ordinary 16-bit model. .*\(UNETLoader\)"),
    "no-tensors": ({}, "a file without tensors"),
    "nunchaku-lora": (
        {"transformer_blocks.0.mlp_fc1.lora_down": HALF, "transformer_blocks.0.mlp_fc1.lora_up": HALF},
        "a LoRA in Nunchaku layout, tied to one base model",
    ),
    "nunchaku-lora-text-stream": (
        {"transformer_blocks.0.mlp_context_fc1.lora_down": HALF},
        "a LoRA in Nunchaku layout",
    ),
    "kohya-lora": (
        {"lora_unet_x.lora_down.weight": HALF, "lora_unet_x.lora_up.weight": HALF, "lora_unet_x.alpha": HALF},
        "a LoRA. Load it with SVDQuant Apply LoRA",
    ),
    "diffusers-lora": (
        {"transformer.x.lora_A.weight": HALF, "transformer.x.lora_B.weight": HALF},
        "a LoRA. Load it",
    ),
    "clip": (
        {"text_model.encoder.layers.0.mlp.fc1.weight": HALF},
        "a 16-bit text encoder. Load it with ComfyUI's Load CLIP",
    ),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": HALF}, "a 16-bit text encoder"),
    "language-model": ({"model.embed_tokens.weight": HALF}, "a 16-bit text encoder"),
    "vae": ({"decoder.conv_in.weight": HALF}, "a VAE. Load it with ComfyUI's Load VAE"),
    "whole-checkpoint": (
        {"model.diffusion_model.out.2.weight": HALF, "first_stage_model.decoder.conv_in.weight": HALF},
        "a whole 16-bit checkpoint. Load it with ComfyUI's Load Checkpoint",
    ),
    "fp8-model": (
        {"x.weight": HALF, "x.comfy_quant": json_tensor({"format": "float8_e4m3fn"})},
        "one of ComfyUI's own quantized formats. Load it with ComfyUI's Load Diffusion Model",
    ),
}


@pytest.mark.parametrize("tensors, message", NOT_OURS.values(), ids=NOT_OURS)
def test_file_without_a_quantized_layer_is_explained(tmp_path, tensors, message):
    path = made.save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"^model.safetensors: expected SVDQuant layers, got .*{message}"):
        open_checkpoint(path)


def test_folder_of_something_else(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(
        ValueError, match=r"model: expected transformer_blocks.safetensors and .*, got neither"
    ):
        open_checkpoint(tmp_path / "model")


def test_path_may_be_text(tmp_path):
    path = made.save(tmp_path / "a.safetensors", made.layer("x"))
    assert open_checkpoint(str(path)).layers["x"].rank == 16


def test_unknown_tensors_beside_a_layer_are_a_warning(tmp_path):
    extra = {"x.ascales": HALF, "y.ascales": HALF, "y.note": HALF}
    tensors = made.layer("x") | made.layer("y") | made.PLAIN | extra
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))
    assert set(found.plain) == set(made.PLAIN)
    assert sorted(found.warnings) == [
        "x.ascales: a quantized layer has no 'ascales' tensor; 2 of this kind ignored.",
        "y.note: a quantized layer has no 'note' tensor; 1 of this kind ignored.",
    ]
    assert found.layers["x"].rank == 16


T = torch.bfloat16
W4A4 = {
    "no-codes": (dict(qweight=None), "x.qweight: expected this tensor beside"),
    "no-scales": (dict(wscales=None), "x.wscales: expected this tensor beside"),
    "no-smooth": (dict(smooth=None), "x.smooth .or .smooth_factor.: expected this tensor beside"),
    "half-a-branch": (dict(lora_up=None), "x.lora_up .or .proj_up.: expected this tensor beside"),
    "the-other-half": (dict(lora_down=None), "x.lora_down .or .proj_down.: expected this tensor beside"),
    "rank-mismatch": (dict(lora_up=torch.ones(128, 32, dtype=T)), r"x.lora_up: expected shape \[128, 16\] .*128, 32"),
    "branch-of-other-k": (dict(lora_down=torch.ones(256, 16, dtype=T)), r"x.lora_down: expected shape \[128, 16\]"),
    "branch-of-other-n": (dict(lora_up=torch.ones(256, 16, dtype=T)), r"x.lora_up: expected shape \[128, 16\]"),
    "branch-one-axis": (dict(lora_down=torch.ones(2048, dtype=T)), r"x.lora_down: expected shape \[128, 0\]"),
    "branch-a-number": (dict(lora_down=torch.ones((), dtype=T)), r"x.lora_down: expected shape \[128, 0\]"),
    "odd-rank": (
        dict(lora_up=torch.ones(128, 8, dtype=T), lora_down=torch.ones(128, 8, dtype=T)),
        "x.lora_down: expected a rank padded to 16, got 8",
    ),
    "scale-count": (dict(wscales=torch.ones(4, 128, dtype=T)), r"x.wscales: expected 256 elements in int4 of group 64"),
    "smooth-length": (dict(smooth=torch.ones(64, dtype=T)), "x.smooth: expected 128 elements"),
    "bias-length": (dict(bias=torch.ones(129, dtype=T)), "x.bias: expected 128 elements"),
    "rows-not-padded": (dict(qweight=torch.ones(96, 64, dtype=torch.int8)), "x.qweight: expected rows .* got 96 x 128"),
    "codes-three-axes": (dict(qweight=torch.ones(2, 64, 64, dtype=torch.int8)), "x.qweight: expected two axes"),
    "codes-as-floats": (dict(qweight=torch.ones(128, 64)), "x.qweight: expected int8 or int32, got float32"),
    "scales-as-integers": (dict(wscales=torch.ones(2, 128).int()), "x.wscales: expected bfloat16 or float16"),
    "int4-with-tensor-scale": (dict(wtscale=torch.ones(1)), "x.wtscale: expected no such tensor in int4"),
    "int4-with-row-scale": (dict(wcscales=torch.ones(128)), "x.wcscales: expected no such tensor in int4"),
    "int4-with-zeros": (dict(wzeros=torch.ones(2, 128)), "x.wzeros: expected no such tensor in int4"),
    "two-dialects": (dict(proj_down=torch.ones(128, 16, dtype=T)), "expected one tensor for down, got also"),
}  # fmt: skip


def changed(stored: dict, changes: dict, layer: str = "x") -> dict:
    tensors = stored | {f"{layer}.{tail}": t for tail, t in changes.items()}
    return {name: t for name, t in tensors.items() if t is not None}


@pytest.mark.parametrize("changes, message", W4A4.values(), ids=W4A4)
def test_bad_w4a4_layer(tmp_path, changes, message):
    tensors = made.layer("good") | changed(made.layer("x"), changes)
    with pytest.raises(ValueError, match=f"^a.safetensors: .*{message}"):
        open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))


def test_a_layer_may_have_no_branch(tmp_path):
    tensors = changed(made.layer("x"), dict(lora_down=None, lora_up=None))
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))
    assert found.info["x"].rank == found.layers["x"].rank == 0


def test_scales_of_another_precision_name_what_the_metadata_says(tmp_path):
    """fp4 codes and second scale, but the micro scales were cast to bf16 on the way."""
    tensors = made.layer("x", "f0", "svdq_nvfp4_linear")
    tensors["x.wscales"] = tensors["x.wscales"].to(T)
    metadata = {"quantization_config": '{"weight": {"dtype": "fp4_e2m1_all"}}'}
    path = made.save(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(
        ValueError, match=r"x.wscales: expected 256 elements in int4 .*metadata says weights are fp4"
    ):
        open_checkpoint(path)


AWQ = {
    "no-zeros": (dict(wzeros=None), "x.wzeros: expected this tensor"),
    "no-scales": (dict(wscales=None), "x.wscales: expected this tensor"),
    "no-codes": (dict(qweight=None), "x.qweight: expected this tensor"),
    "scales-by-row": (dict(wscales=torch.ones(8, 16)), r"x.wscales: expected shape \[16, 8\]"),
    "no-rows": (
        dict(qweight=torch.ones(0, 512, dtype=torch.int32)),
        "x.qweight: expected columns .* got 0 x 1024",
    ),
    "columns": (
        dict(qweight=torch.ones(2, 48, dtype=torch.int32)),
        "x.qweight: expected columns in multiples of 64",
    ),
    "bias-length": (dict(bias=torch.ones(7)), r"x.bias: expected shape \[8\]"),
    "with-smooth": (dict(smooth=torch.ones(1024)), "x.smooth: expected no such tensor in a W4A16 layer"),
}


@pytest.mark.parametrize("changes, message", AWQ.values(), ids=AWQ)
def test_bad_awq_layer(tmp_path, changes, message):
    tensors = made.layer("good") | changed(made.layer("x", "a0", "awq_w4a16"), changes)
    with pytest.raises(ValueError, match=f"^a.safetensors: .*{message}"):
        open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))


POISON = [
    *[("c0", "svdq_int4_linear", tail) for tail in ("wscales", "smooth", "lora_down", "lora_up", "bias")],
    ("f0", "svdq_nvfp4_linear", "wtscale"),
    ("f1", "svdq_nvfp4_linear", "wcscales"),
    *[("a0", "awq_w4a16", tail) for tail in ("wscales", "wzeros", "bias")],
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("case, file, tail", POISON)
def test_nan_is_named_when_the_layer_is_decoded(tmp_path, case, file, tail, value):
    tensors = made.layer("x", case, file)
    poisoned = tensors[f"x.{tail}"].float()
    poisoned.view(-1)[-1] = value
    tensors[f"x.{tail}"] = poisoned.to(tensors[f"x.{tail}"].dtype)
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors | made.layer("good")))
    with pytest.raises(
        ValueError, match=f"^a.safetensors: x.{tail}: expected finite numbers, got NaN or inf"
    ):
        found.layers["x"]
    assert found.layers["good"].rank == 16


def test_nan_in_e4m3_scales(tmp_path):
    tensors = made.layer("x", "f0", "svdq_nvfp4_linear")
    tensors["x.wscales"] = tensors["x.wscales"].clone()
    tensors["x.wscales"].view(torch.uint8)[3, 5] = 0xFF
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))
    with pytest.raises(ValueError, match=r"x.wscales: expected finite numbers"):
        found.layers["x"]


def test_zero_in_smooth(tmp_path):
    tensors = made.layer("x")
    tensors["x.smooth"] = tensors["x.smooth"].clone()
    tensors["x.smooth"][7] = 0
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))
    with pytest.raises(ValueError, match=r"x.smooth: expected no zero"):
        found.layers["x"]


def test_nan_in_the_vector_no_kernel_reads_does_not_matter(tmp_path):
    tensors = made.layer("x") | {"x.smooth_orig": torch.full((128,), float("nan"), dtype=T)}
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))
    assert made.same(found.layers["x"].smooth, golden.case("svdq_int4_linear", "c0.logical")["smooth"])
