"""LoRAs for host layers that share one stored linear: each changes its own rows of it, and no others."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.loaders import natural
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.adapters.baking import bake
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tests.tolerances import assert_close

D = 128
UNET = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.",
    "input_blocks.4.1.transformer_blocks.0.attn1.",
)
SHARED = {  # the stored linear, a host's layer, its rows of the stored ones, how many hosts share them
    "z-image-gate": ("layers.0.feed_forward.net.0.proj", "layers.0.feed_forward.w1", 1, 2),
    "z-image-value": ("layers.0.feed_forward.net.0.proj", "layers.0.feed_forward.w3", 0, 2),
    "sdxl-q": (f"{UNET[0]}to_qkv", f"{UNET[1]}to_q", 0, 3),
    "sdxl-v": (f"{UNET[0]}to_qkv", f"{UNET[1]}to_v", 2, 3),
}
shared = pytest.mark.parametrize(("stored", "module", "which", "count"), SHARED.values(), ids=SHARED)


def baked(folder, stored, plain, module, members, strength):
    """The checkpoint before and after a LoRA for one host layer."""
    natural.write(folder / "base.safetensors", stored, plain, {})
    lora = {f"diffusion_model.{module}.{tail}": t for tail, t in members.items()}
    made.save(folder / "lora.safetensors", lora)
    loras = [(folder / "lora.safetensors", strength)]
    done = bake.bake(folder / "base.safetensors", loras, folder / "out.safetensors")
    assert done.unmatched == () and done.rest is None
    return open_checkpoint(folder / "base.safetensors"), open_checkpoint(done.target)


def in_its_rows(values, which, count):
    """Zeros for every row that another host has."""
    parts = [torch.zeros_like(values) for _ in range(count)]
    parts[which] = values
    return torch.cat(parts)


@shared
def test_a_bias_changes_where_its_host_is(tmp_path, stored, module, which, count):
    weights, difference = layers.random_linear("int4", count * D, D), layers.random(D, seed=7)
    before, after = baked(tmp_path, {stored: weights}, {}, module, {"diff_b": difference}, 0.5)
    want = weights.bias + in_its_rows(difference * 0.5, which, count).bfloat16()
    assert torch.equal(after.layers[stored].bias, want)
    assert torch.equal(before.layers[stored].bias, weights.bias)


@shared
def test_a_branch_grows_where_its_host_is(tmp_path, stored, module, which, count):
    weights = layers.random_linear("int4", count * D, D)
    up, down = layers.random(D, 4, seed=8), layers.random(4, D, seed=9)
    pair = {"lora_up.weight": up, "lora_down.weight": down}
    before, after = baked(tmp_path, {stored: weights}, {}, module, pair, 0.5)
    old, new = before.layers[stored], after.layers[stored]
    assert torch.equal(new.down[: old.rank], old.down) and torch.equal(new.up[:, : old.rank], old.up)
    added = new.up[:, old.rank :].double() @ new.down[old.rank :].double()
    assert_close(added, in_its_rows(0.5 * up.double() @ down.double(), which, count), "two_bf16_factors")


@pytest.mark.parametrize("which", [0, 1], ids=["value", "gate"])
def test_a_16_bit_linear_changes_where_its_host_is(tmp_path, which):
    """Of a refiner block that is kept in 16 bits, beside a 4-bit layer by which the family is known."""
    name = "noise_refiner.0.feed_forward."
    plain = {f"{name}net.0.proj.weight": layers.random(2 * D, D, seed=1, dtype=torch.bfloat16)}
    plain[f"{name}net.0.proj.bias"] = layers.random(2 * D, seed=2, dtype=torch.bfloat16)
    members = {"diff": layers.random(D, D, seed=3), "diff_b": layers.random(D, seed=4)}
    known = {"layers.0.attention.to_qkv": layers.random_linear("int4", 3 * D, D)}
    _, after = baked(tmp_path, known, plain, f"{name}{('w3', 'w1')[which]}", members, 0.5)
    for end, member in (("weight", "diff"), ("bias", "diff_b")):
        before = plain[f"{name}net.0.proj.{end}"].double()
        want = before + in_its_rows(0.5 * members[member].double(), which, 2)
        assert_close(after.plain[f"{name}net.0.proj.{end}"], want, "bf16_output")
