"""The natural dialect: what is written, read back, and refused."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.loaders import natural
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.tests import golden, layers
from svdquant_nodes.tests.loaders import made

FORMATS = list(layers.FORMATS)


def weights(name: str):
    return layers.random_linear(name, 48, 192, rank=5)


@pytest.mark.parametrize("packed", [False, True], ids=["code-a-byte", "packed"])
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_keeps_every_bit_and_the_shift(tmp_path, name, packed):
    path, w = tmp_path / "a.safetensors", weights(name)
    natural.write(path, {"a.b": w}, made.PLAIN, {"config": "{}"}, packed=packed)
    back = open_checkpoint(path)
    assert back.dialect == "natural" and back.metadata == {"config": "{}"}
    assert back.layers["a.b"].spec == back.info["a.b"].spec == w.spec
    assert made.same_tensors(back.layers["a.b"].tensors(), w.tensors())
    assert made.same_tensors(back.plain, made.PLAIN)


def test_a_plain_tensor_may_be_called_like_a_field(tmp_path):
    path, plain = tmp_path / "a.safetensors", {"block.up": torch.ones(4), "other.zeros": torch.ones(4)}
    natural.write(path, {"a.b": weights("int4")}, plain, {})
    assert made.same_tensors(open_checkpoint(path).plain, plain)


def test_codes_are_the_numbers_themselves():
    """The golden logical codes, as they are."""
    t = natural.encode_linear(golden.int4_linear("c0"))
    assert made.same(t["codes"], golden.case("svdq_int4_linear", "c0.logical")["q"])
    assert t["codes"].min() == -8
    t = natural.encode_linear(golden.nvfp4_linear("f1"))
    logical = golden.case("svdq_nvfp4_linear", "f1.logical")
    assert made.same(t["codes"], logical["code"]) and made.same(t["scales"], logical["subscale_e4m3"])
    assert made.same(t["second_scale"], logical["scale0"])
    t = natural.encode_linear(golden.awq_linear("a0"))
    assert t["codes"].dtype == torch.uint8 and t["codes"].max() <= 14


def tensors(name: str, **changes) -> dict[str, torch.Tensor]:
    found = {**natural.encode_linear(weights(name)), **changes}
    return {f"a.b.{tail}": t for tail, t in found.items() if t is not None}


def test_packed_codes_take_half_the_bytes():
    whole, packed = (natural.encode_linear(weights("int4"), packed=p) for p in (False, True))
    assert packed["nibbles"].nbytes * 2 == whole["codes"].nbytes
    assert "codes" not in packed


def test_layers_of_every_kind_in_one_file(tmp_path):
    path = tmp_path / "a.safetensors"
    mixed = {f"a.{name}": layers.random_linear(name, 48, 192, rank=r) for r, name in enumerate(FORMATS)}
    natural.write(path, mixed, {"a.plain.weight": torch.ones(48, 192)}, {}, packed=True)
    back = open_checkpoint(path)
    assert {name: (i.spec, i.rank) for name, i in back.info.items()} == {
        name: (w.spec, w.rank) for name, w in mixed.items()
    }
    assert list(back.plain) == ["a.plain.weight"]


BAD = {
    "codes-twice": (
        "int4",
        dict(nibbles=torch.zeros(48, 96, dtype=torch.uint8)),
        "expected one tensor for codes, got also",
    ),
    "int4-without-smooth": ("int4", dict(smooth=None), "a.b.smooth: expected this tensor"),
    "int4-with-second-scale": (
        "int4",
        dict(second_scale=torch.ones(1)),
        "second_scale: expected no such tensor in an",
    ),
    "nvfp4-without-second-scale": (
        "nvfp4",
        dict(second_scale=None),
        "a.b.second_scale: expected this tensor",
    ),
    "nvfp4-with-shift": (
        "nvfp4",
        dict(act_shift=torch.ones(1)),
        "act_shift: expected no such tensor in an nvfp4",
    ),
    "awq-without-zeros": ("awq", dict(zeros=None), "a.b.zeros: expected this tensor"),
    "scales-by-column": ("int4", dict(scales=torch.ones(3, 48)), "scales: expected one row of group scales"),
    "scales-of-more-rows": (
        "int4",
        dict(scales=torch.ones(49, 3)),
        "scales: expected one row of group scales",
    ),
    "no-rows": (
        "int4",
        dict(codes=torch.zeros(0, 192, dtype=torch.int8), scales=torch.ones(0, 3)),
        "scales: expected one row of group scales",
    ),
    "scales-do-not-divide": (
        "int4",
        dict(scales=torch.ones(48, 5)),
        "scales: expected one row of group scales",
    ),
    "codes-one-axis": (
        "int4",
        dict(codes=torch.ones(48 * 192, dtype=torch.int8)),
        "scales: expected one row",
    ),
    "rank-mismatch": ("int4", dict(up=torch.ones(48, 6)), r"up: expected shape \[48, 5\]"),
    "bias-length": ("int4", dict(bias=torch.ones(47)), r"bias: expected shape \[48\]"),
    "shift-nan": (
        "int4",
        dict(act_shift=torch.tensor([float("nan")])),
        "act_shift: expected a finite number from 0 on, got nan",
    ),
    "shift-below-zero": (
        "int4",
        dict(act_shift=torch.tensor([-0.5])),
        "act_shift: expected a finite number from 0 on, got -0.5",
    ),
    "two-shifts": ("int4", dict(act_shift=torch.ones(2)), "act_shift: expected 1 elements"),
}


@pytest.mark.parametrize("name, changes, message", BAD.values(), ids=BAD)
def test_bad_layer(tmp_path, name, changes, message):
    path = made.save(tmp_path / "a.safetensors", tensors(name, **changes))
    with pytest.raises(ValueError, match=f"^a.safetensors: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("name, value", [("int4", 8), ("int4", -9), ("nvfp4", 16), ("awq", 16)])
def test_code_out_of_range(tmp_path, name, value):
    codes = natural.encode_linear(weights(name))["codes"]
    codes[3, 4] = value
    found = open_checkpoint(made.save(tmp_path / "a.safetensors", tensors(name, codes=codes)))
    with pytest.raises(ValueError, match=f"a.safetensors: a.b: codes: expected .*, got .*{value}"):
        found.layers["a.b"]
