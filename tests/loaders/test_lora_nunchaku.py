"""The LoRA inside a file of the Nunchaku engine, told apart from the branch it was joined to."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.loaders import lora_nunchaku
from svdquant_nodes.svdquant.core import tiles
from svdquant_nodes.tests import golden

GOLDEN = "lora_flux_mini"
D, S = "transformer_blocks.0", "single_transformer_blocks.0"


def stored(name, case="conv0"):
    t = golden.case(GOLDEN, f"{case}.{name}")
    return t["lora_down"], t["lora_up"]


def base(name):
    t = golden.case(GOLDEN, f"base.{name}")
    return t["lora_down"], t["lora_up"]


def source(name, lora="lora0"):
    """down, up of one layer of the original LoRA."""
    t = golden.case(GOLDEN, f"{lora}.transformer.{name}")
    return t["lora_A.weight"].double(), t["lora_B.weight"].double()


def product(name, lora="lora0"):
    down, up = source(name, lora)
    return up @ down


EXPECTED = {
    f"{D}.qkv_proj": lambda: torch.cat([product(f"{D}.attn.to_{x}") for x in "qkv"]),
    f"{D}.qkv_proj_context": lambda: torch.cat([product(f"{D}.attn.add_{x}_proj") for x in "qkv"]),
    f"{D}.out_proj": lambda: product(f"{D}.attn.to_out.0"),
    f"{D}.mlp_fc1": lambda: product(f"{D}.ff.net.0.proj"),
    f"{D}.mlp_fc2": lambda: product(f"{D}.ff.net.2"),
    f"{S}.qkv_proj": lambda: torch.cat([product(f"{S}.attn.to_q"), torch.zeros(256, 128)]),
    f"{S}.mlp_fc1": lambda: product(f"{S}.proj_mlp"),
    f"{S}.out_proj": lambda: product(f"{S}.proj_out")[:, :128],
    f"{S}.mlp_fc2": lambda: product(f"{S}.proj_out")[:, 128:],
}
RANKS = {f"{D}.qkv_proj": 12, f"{D}.qkv_proj_context": 8, f"{D}.mlp_fc1": 4, f"{D}.mlp_fc2": 8}


@pytest.mark.parametrize("name", EXPECTED)
def test_extracted_lora_is_the_original(name):
    down, up = lora_nunchaku.extract(stored(name), base(name))
    assert torch.equal(up.double() @ down.double(), EXPECTED[name]())
    assert down.shape[0] == RANKS.get(name, 4)  # padding ranks are gone


def test_a_layer_without_lora_gives_rank_zero():
    down, up = lora_nunchaku.extract(stored(f"{D}.out_proj_context"), base(f"{D}.out_proj_context"))
    assert down.shape == (0, 128) and up.shape == (128, 0)


def test_rows_shared_among_host_layers():
    """A host that keeps q, k and v apart asks for its third of the rows."""
    name = f"{D}.qkv_proj"
    d0, u0 = base(name)
    down, up = lora_nunchaku.extract(stored(name), (d0, u0[128:256]), first=128)
    assert torch.equal(up.double() @ down.double(), product(f"{D}.attn.to_k"))


@pytest.mark.parametrize(
    ("name", "splits"), [(f"{D}.norm1.linear", 6), (f"{S}.norm.linear", 3)], ids=["double", "single"]
)
def test_modulation_rows_come_back_in_the_models_order(name, splits):
    down, up = lora_nunchaku.plain(stored(name), splits)
    want_down, want_up = source(name)
    assert torch.equal(down.double(), want_down)
    assert torch.equal(up.double(), want_up)


def test_another_base_is_recognised():
    name = f"{D}.qkv_proj"
    d0, u0 = base(name)
    assert lora_nunchaku.extract(stored(name), (d0 + 1, u0)) is None
    assert lora_nunchaku.extract(stored(name), (torch.cat([d0] * 3), torch.cat([u0] * 3, 1))) is None


@pytest.mark.parametrize(
    ("down", "up"), [((128, 24), (128, 24)), ((120, 16), (128, 16)), ((128, 32), (128, 16))]
)
def test_a_pair_that_is_in_no_tiles_was_made_on_no_base(down, up):
    pair = torch.ones(down), torch.ones(up)
    assert lora_nunchaku.extract(pair, (torch.ones(16, 128), torch.ones(128, 16))) is None


def test_packing_is_that_of_a_branch():
    down, up = tiles.untile_down(stored(f"{D}.out_proj")[0]), tiles.untile_up(stored(f"{D}.out_proj")[1])
    d0, u0 = base(f"{D}.out_proj")
    assert torch.equal(down[:16], d0) and torch.equal(up[:, :16], u0)


def test_detected_by_names_without_weight():
    assert lora_nunchaku.detect(["a.qkv_proj.lora_down"])
    assert not lora_nunchaku.detect(["a.lora_down.weight", "a_lora.down.weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.lora_down": torch.ones(16, 16)}, "a: expected lora_down and lora_up, got only lora_down"),
        (
            {"a.lora_down": torch.ones(16, 16), "a.lora_up": torch.ones(16, 32)},
            "expected two factors of one rank",
        ),
        (
            {"a.lora_down": torch.ones(16, 16), "a.lora_up": torch.ones(16, 16, 1)},
            "expected two factors of one rank",
        ),
        (
            {"a.lora_down": torch.ones(16, 16, 1), "a.lora_up": torch.ones(16, 16)},
            "expected two factors of one rank",
        ),
    ],
    ids=["half", "ranks", "axes-of-up", "axes-of-down"],
)
def test_damaged_pairs_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        lora_nunchaku.group(tensors)
