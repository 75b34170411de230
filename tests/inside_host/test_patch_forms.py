"""One patch in the host's form: its name and tensors, what it covers, and whether it looks at the weight."""

from __future__ import annotations

import pytest
import torch
from comfy.weight_adapter import GLoRAAdapter, LoRAAdapter

from svdquant_nodes.svdquant.adapters.lora import patches

N, K, R = 6, 4, 2
UP, DOWN, DIFF = torch.ones(N, R), torch.ones(R, K), torch.ones(N, K)
MAGNITUDES, ALPHA = torch.ones(N, 1), 2.0


def lora(dora=None, reshape=None):
    return LoRAAdapter(set(), (UP, DOWN, ALPHA, None, dora, reshape))


VALUES = {  # value -> what a user calls it, the tails of its tensors, whether it is blind
    "lora": (lora(), "LoRA", {"lora_up.weight", "lora_down.weight", "alpha"}, True),
    "dora": (lora(MAGNITUDES), "DoRA", {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale"}, False),
    "widening": (
        lora(reshape=[8, 8]),
        "LoRA",
        {"lora_up.weight", "lora_down.weight", "alpha", "reshape_weight"},
        False,
    ),
    "glora": (
        GLoRAAdapter(set(), (DOWN, UP, DOWN, UP, ALPHA, None)),
        "GLoRA",
        {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"},
        False,
    ),
    "difference": (("diff", (DIFF,)), "difference", {"diff"}, True),
    "difference-unnamed": ((DIFF,), "difference", {"diff"}, True),
    "difference-that-pads": (("diff", (DIFF, {"pad_weight": True})), "difference", None, False),
    "replacement": (("set", (DIFF,)), "replacement", None, False),
}


@pytest.mark.parametrize(("value", "kind", "tails", "blind"), VALUES.values(), ids=VALUES)
def test_forms(value, kind, tails, blind):
    members = patches.members_of(value)
    assert (None if members is None else set(members)) == tails
    assert patches.is_blind((1.0, value, 1.0, None, None)) == blind
    assert patches.kind_of(value) == kind


@pytest.mark.parametrize(
    "rest", [(0.5, None, None), (1.0, None, lambda w: w)], ids=["scaled-base", "through-a-function"]
)
def test_what_scales_or_changes_the_weight_is_not_blind(rest):
    strength_model, offset, function = rest
    assert not patches.is_blind((1.0, lora(), strength_model, offset, function))


def test_a_strength_and_an_offset_leave_it_blind():
    assert patches.is_blind((0.3, lora(), 1.0, (0, 2, 6), None))


def test_regions():
    assert patches.region(None, (N, K)) == (slice(0, N), slice(0, K))
    assert patches.region((0, 2, 3), (N, K)) == (slice(2, 5), slice(0, K))
    assert patches.region((1, 1, 3), (N, K)) == (slice(0, N), slice(1, 4))


def test_misfits():
    assert patches.misfit(lora(), (N, K)) == ""
    assert patches.misfit(lora(), (K, N)) == "expected [4, 6], got [6, 4]"
    assert patches.misfit(("diff", (torch.ones(5),)), (N, K)) == "expected [6, 4], got [5]"
    assert patches.misfit(lora(reshape=[N, K]), (8, 8)) == ""
    assert patches.misfit(("set", (DIFF,)), (1, 1)) == ""
