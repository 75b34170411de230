"""T5 text encoders in Nunchaku's layout: golden vectors both ways, bad headers, and the published file's header."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.loaders import natural, nunchaku, nunchaku_t5
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.core.int4 import unpack_unsigned
from svdquant_nodes.svdquant.core.weights import QuantSpec
from svdquant_nodes.tests import golden, oracle
from svdquant_nodes.tests.loaders import made

GROUPS = {"t0": 128, "t1": 64}
CASES = pytest.mark.parametrize("case", GROUPS, ids=["group-128", "group-64-rows-padded"])


def opened(tmp_path, tensors):
    return open_checkpoint(made.save(tmp_path / "a.safetensors", tensors))


@CASES
def test_golden_decodes(tmp_path, case):
    logical = golden.case("awq_w4a16", f"{case}.logical")
    checkpoint = opened(tmp_path, made.layer("x", case, "awq_w4a16"))
    assert checkpoint.dialect == "nunchaku_t5"
    assert checkpoint.info["x"].spec == QuantSpec("awq", GROUPS[case])
    weights = checkpoint.layers["x"]
    assert made.same(unpack_unsigned(weights.codes), logical["q"])
    assert made.same(weights.scales, logical["scale"]) and made.same(weights.zeros, -logical["zero_scaled"])


@CASES
def test_golden_encodes(tmp_path, case):
    stored = golden.case("awq_w4a16", f"{case}.packed")
    weights = opened(tmp_path, made.layer("x", case, "awq_w4a16")).layers["x"]
    assert made.same_tensors(nunchaku_t5.encode_linear(weights), stored)


def test_codes_lie_where_the_formula_puts_them(tmp_path):
    codes = torch.randint(0, 16, (8, 256))
    packed = torch.frombuffer(bytearray(oracle.store_nibbles(codes, oracle.p7)), dtype=torch.int16)
    tensors = {"x.qweight": packed.reshape(2, 256)}
    tensors |= {f"x.{tail}": torch.ones(8, 8).half() for tail in ("scales", "scaled_zeros")}
    assert torch.equal(unpack_unsigned(opened(tmp_path, tensors).layers["x"].codes).long(), codes)


@CASES
def test_through_the_other_dialect_and_back(tmp_path, case):
    """natural knows the group by the scales; what comes back is the file's own bytes."""
    stored = made.layer("x", case, "awq_w4a16")
    natural.write(tmp_path / "b.safetensors", opened(tmp_path, stored).layers, {}, {})
    found = open_checkpoint(tmp_path / "b.safetensors")
    assert found.info["x"].spec.group == GROUPS[case]
    if GROUPS[case] == 128:  # AWQ of group 64 is a modulation everywhere else
        nunchaku.write(tmp_path / "c.safetensors", found.layers, {}, {})
        again = open_checkpoint(tmp_path / "c.safetensors")
        assert made.same_tensors(again.stored, stored)


BAD = {
    "no-zeros": (dict(scaled_zeros=None), "x.scaled_zeros: expected this tensor beside"),
    "no-scales": (dict(scales=None), "x.scales: expected this tensor beside"),
    "rows-of-no-group": (
        dict(scales=torch.ones(9, 32).half()),
        r"x.scales: expected scale rows for groups of .*, got 9",
    ),
    "scales-by-row": (dict(scales=torch.ones(8, 33).half()), r"x.scales: expected shape \[8, 32\]"),
    "fewer-zeros": (dict(scaled_zeros=torch.ones(4, 32).half()), r"x.scaled_zeros: expected shape \[8, 32\]"),
    "integer-scales": (dict(scales=torch.ones(8, 32).int()), "x.scales: expected bfloat16 or float16"),
    "columns": (
        dict(qweight=torch.ones(8, 96, dtype=torch.int16)),
        r"x.qweight: expected \(N/4, K\) with K in multiples of 64, got \[8, 96\]",
    ),
    "one-axis": (dict(qweight=torch.ones(96, dtype=torch.int16)), r"x.qweight: expected \(N/4, K\)"),
    "no-rows": (dict(qweight=torch.ones(0, 256, dtype=torch.int16)), r"x.qweight: expected \(N/4, K\)"),
    "bias-length": (dict(bias=torch.ones(7).half()), r"x.bias: expected shape \[32\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_layer(tmp_path, changes, message):
    tensors = made.layer("x", "t0", "awq_w4a16") | {f"x.{tail}": t for tail, t in changes.items()}
    with pytest.raises(ValueError, match=f"^a.safetensors: .*{message}"):
        opened(tmp_path, {name: t for name, t in tensors.items() if t is not None})


def test_nan_is_named(tmp_path):
    tensors = made.layer("x", "t0", "awq_w4a16")
    tensors["x.scaled_zeros"] = torch.full_like(tensors["x.scaled_zeros"], torch.nan)
    checkpoint = opened(tmp_path, tensors)
    with pytest.raises(ValueError, match="^a.safetensors: x.scaled_zeros: expected finite numbers"):
        checkpoint.layers["x"]


def test_the_published_file(tmp_path):
    """Every name and shape of T5-XXL: 168 linears, and 2.99 GB, which is what the hub says of the file."""
    path, size = made.sparse(tmp_path / "t5.safetensors", made.t5_xxl_shapes())
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.stored) == 556 and round(size / 1e9, 2) == 2.99
    assert {layer.spec for layer in checkpoint.info.values()} == {QuantSpec("awq", 128)}
    assert len(checkpoint.info) == 24 * 7 and checkpoint.warnings == ()
    wo = checkpoint.info["encoder.block.23.layer.1.DenseReluDense.wo"]
    assert (wo.out_features, wo.in_features) == (4096, 10240)
