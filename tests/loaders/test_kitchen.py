"""The kitchen dialect: its golden layouts both ways, and conversion from Nunchaku without loss."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from svdquant_nodes.loaders import kitchen, natural
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.core.weights import GELU_SHIFT, QuantSpec
from svdquant_nodes.tests import golden, layers
from svdquant_nodes.tests.loaders import made


def json_tensor(settings) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)


def settings_of(tensor: torch.Tensor) -> dict:
    return json.loads(bytes(tensor.tolist()))


def natural_layer(case: str) -> dict[str, torch.Tensor]:
    settings = {"format": "svdquant_w4a4", **({"act_unsigned": True} if case == "c3" else {})}
    return golden.case("kitchen", f"{case}.natural") | {"comfy_quant": json_tensor(settings)}


def packed_layer(case: str) -> dict[str, torch.Tensor]:
    """Tiles where the layout has tiles, the rest as in the natural layout."""
    return golden.case("kitchen", f"{case}.natural") | golden.case("kitchen", f"{case}.tile")


def opened(path, tensors: dict[str, torch.Tensor], layer: str = "a.b"):
    return open_checkpoint(made.save(path, {f"{layer}.{tail}": t for tail, t in tensors.items()}))


@pytest.mark.parametrize("make", [natural_layer, packed_layer])
@pytest.mark.parametrize("case", ["c1", "c3"])
def test_golden_layouts_decode(tmp_path, case, make):
    found = opened(tmp_path / "a.safetensors", make(case))
    want = golden.int4_linear(case)
    assert found.dialect == "kitchen"
    assert made.same_tensors(found.layers["a.b"].tensors(), want.tensors())
    assert found.layers["a.b"].spec == found.info["a.b"].spec == want.spec
    assert found.info["a.b"].spec.act_shift == (GELU_SHIFT if case == "c3" else 0)


@pytest.mark.parametrize("case", ["c1", "c3"])
def test_golden_natural_layout_encodes(case):
    tensors = kitchen.encode_linear(golden.int4_linear(case))
    settings = settings_of(tensors.pop("comfy_quant"))
    assert made.same_tensors(tensors, golden.case("kitchen", f"{case}.natural"))
    published = settings_of(golden.case("kitchen", f"{case}.tile")["comfy_quant"])
    assert settings == {key: value for key, value in published.items() if key != "layout"}


def test_golden_awq_encodes():
    """The published bf16 zero is our exact one, rounded."""
    tensors = kitchen.encode_linear(golden.awq_linear("a0"))
    want = golden.case("kitchen", "a0.kitchen")
    assert made.same(tensors["weight_zero"], want["weight_zero_fp32"])
    assert made.same(tensors["weight_zero"].bfloat16(), want["weight_zero"])
    for tail in ("weight", "weight_scale", "comfy_quant"):
        assert made.same(tensors[tail], want[tail])


def test_awq_decodes_back_to_the_bit(tmp_path):
    want = golden.awq_linear("a0")
    found = opened(tmp_path / "a.safetensors", kitchen.encode_linear(want))
    assert made.same_tensors(found.layers["a.b"].tensors(), want.tensors())


def test_awq_with_rounded_zeros_keeps_what_the_file_says(tmp_path):
    tensors = golden.case("kitchen", "a0.kitchen")
    del tensors["weight_zero_fp32"]
    w = opened(tmp_path / "a.safetensors", tensors).layers["a.b"]
    exact = tensors["weight_zero"].double() - 8 * tensors["weight_scale"].double()
    assert torch.equal(w.zeros.double(), exact.T)


@pytest.mark.parametrize("group", [64, 128])
def test_awq_group_is_stated(tmp_path, group):
    w = golden.awq_linear("a0")
    w = replace(
        w,
        spec=QuantSpec("awq", group),
        scales=w.scales[:, : 1024 // group],
        zeros=w.zeros[:, : 1024 // group],
    )
    found = opened(tmp_path / "a.safetensors", kitchen.encode_linear(w))
    assert found.info["a.b"].spec == w.spec
    assert made.same_tensors(found.layers["a.b"].tensors(), w.tensors())


def test_both_spellings_of_the_names(tmp_path):
    other = {
        "smooth_factor": "weight_smooth_factor",
        "proj_down": "weight_proj_down",
        "proj_up": "weight_proj_up",
    }
    tensors = {other.get(tail, tail): t for tail, t in natural_layer("c1").items()}
    found = opened(tmp_path / "a.safetensors", tensors)
    assert made.same_tensors(found.layers["a.b"].tensors(), golden.int4_linear("c1").tensors())


def test_nunchaku_to_kitchen_to_natural_loses_nothing(tmp_path):
    source = open_checkpoint(golden.FOLDER / "mini_flux_int4.safetensors")
    natural.write(tmp_path / "direct.safetensors", source.layers, source.plain, source.metadata)
    kitchen.write(tmp_path / "kitchen.safetensors", source.layers, source.plain, source.metadata)
    middle = open_checkpoint(tmp_path / "kitchen.safetensors")
    natural.write(tmp_path / "around.safetensors", middle.layers, middle.plain, middle.metadata)
    direct, around = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("direct", "around"))
    assert made.same_tensors(around.stored, direct.stored)
    assert around.metadata == direct.metadata == source.metadata


def test_nvfp4_has_no_kitchen_form():
    with pytest.raises(ValueError, match="kitchen has no NVFP4"):
        kitchen.encode_linear(layers.random_linear("nvfp4", 128, 128))


def test_another_shift_has_no_kitchen_form():
    w = layers.random_linear("int4", 128, 128)
    with pytest.raises(ValueError, match=r"kitchen knows the activation shift 0.171875 only, got 0.5"):
        kitchen.encode_linear(replace(w, spec=QuantSpec("int4", 64, 0.5)))


def test_layers_of_other_formats_stay_plain(tmp_path):
    tensors = {f"a.{tail}": t for tail, t in natural_layer("c1").items()}
    tensors |= {"b.weight": torch.ones(2, 2), "b.comfy_quant": json_tensor({"format": "float8_e4m3fn"})}
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))
    assert set(found.layers) == {"a"} and set(found.plain) == {"b.weight", "b.comfy_quant"}
    assert found.warnings == ("b: format float8_e4m3fn is not read here; 1 layers stay plain tensors.",)


def test_fp8_layers_without_a_description_stay_plain(tmp_path):
    """As the host scales them: weight, weight_scale and bias are no half of a 4-bit layer."""
    tensors = {f"a.{tail}": t for tail, t in natural_layer("c1").items()}
    eight = {"b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "b.weight_scale": torch.ones(())}
    found = open_checkpoint(
        made.save(tmp_path / "a.safetensors", tensors | eight | {"b.bias": torch.ones(2)})
    )
    assert set(found.layers) == {"a"} and set(found.plain) == {"b.weight", "b.weight_scale", "b.bias"}


BAD = {
    "not-json": (
        dict(comfy_quant=torch.tensor([123, 1], dtype=torch.uint8)),
        "comfy_quant: expected a JSON object",
    ),
    "not-an-object": (dict(comfy_quant=json_tensor([1])), "comfy_quant: expected a JSON object"),
    "unknown-layout": (
        dict(comfy_quant=json_tensor({"format": "svdquant_w4a4", "layout": "spiral"})),
        "comfy_quant: expected layout to be 'kitchen_tile_packed_w4a4', got 'spiral'",
    ),
    "branch-on-smoothed": (
        dict(comfy_quant=json_tensor({"format": "svdquant_w4a4", "lowrank_branch_input_basis": "smoothed"})),
        "expected lowrank_branch_input_basis to be 'raw'",
    ),
    "tiles-said-not-there": (
        dict(comfy_quant=json_tensor({"format": "svdquant_w4a4", "layout": "kitchen_tile_packed_w4a4"})),
        r"weight: expected \[N/128, K/64, 32, 128\], got \[256, 96\]",
    ),
    "tiles-not-said": (
        dict(weight=golden.case("kitchen", "c1.tile")["weight"]),
        r"weight: expected \[N, K/2\] with K in multiples of 64, got \[2, 3, 32, 128\]",
    ),
    "scale-shape": (dict(weight_scale=torch.ones(256, 3)), r"weight_scale: expected shape \[3, 256\]"),
    "rank-mismatch": (dict(proj_up=torch.ones(256, 16)), r"proj_up: expected shape \[256, 32\]"),
    "branch-a-number": (
        dict(proj_down=torch.ones(())),
        r"proj_down: expected shape \[192, 0\] \(in_features",
    ),
    "no-rows": (dict(weight=torch.ones(0, 96, dtype=torch.int8)), r"weight: expected .*, got \[0, 96\]"),
    "no-smooth": (dict(smooth_factor=None), "a.b.smooth_factor: expected this tensor beside .* got none"),
    "no-weight": (dict(weight=None), "a.b.weight: expected this tensor"),
    "no-json": (dict(comfy_quant=None), "a.b.comfy_quant: expected this tensor"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_layer(tmp_path, changes, message):
    tensors = {tail: t for tail, t in (natural_layer("c1") | changes).items() if t is not None}
    extra = {f"good.{tail}": t for tail, t in natural_layer("c1").items()}
    path = made.save(tmp_path / "a.safetensors", extra | {f"a.b.{tail}": t for tail, t in tensors.items()})
    with pytest.raises(ValueError, match=f"^a.safetensors: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("group", [0, 48, "64", 4096], ids=str)
def test_bad_awq_group(tmp_path, group):
    tensors = kitchen.encode_linear(golden.awq_linear("a0"))
    tensors["comfy_quant"] = json_tensor({"format": "awq_w4a16", "group_size": group})
    with pytest.raises(ValueError, match="comfy_quant: expected a group_size that divides 1024, got"):
        opened(tmp_path / "a.safetensors", tensors)
