"""LoRAs whose layers are fused and the model's are not: each part gets its rows, at run time and baked."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.baking.bake import bake
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.lora.apply import apply_lora
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.quantizer import stream
from svdquant_nodes.tests.inside_host import loras, small
from svdquant_nodes.tests.inside_host.test_lora_families import (
    NAMINGS,
    RANK,
    STRENGTH,
    twins_of,
    weight_of,
    with_weights,
    written,
)
from svdquant_nodes.tests.inside_host.twins import EXACT_ACTIVATIONS, error
from svdquant_nodes.tests.small_models import SMALL, detecting, random_weights
from svdquant_nodes.tests.tolerances import assert_close

SDXL = "input_blocks.4.1.transformer_blocks.0."
QWEN, ATTENTION = "transformer_blocks.1.attn.", "blocks.0.self_attn."
# The file's layer, and the host's in the order of its rows.
FUSED = {
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_qkv": [
            f"{SDXL}attn1.to_{x}" for x in "qkv"
        ],
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_kv": [f"{SDXL}attn2.to_{x}" for x in "kv"],
    },
    "qwen-image": {
        f"{QWEN}to_qkv": [f"{QWEN}to_{x}" for x in "qkv"],
        f"{QWEN}add_qkv_proj": [f"{QWEN}add_{x}_proj" for x in "qkv"],
    },
    "z-image": {
        "layers.1.attention.to_qkv": ["layers.1.attention.qkv"],
        "layers.0.feed_forward.net.0.proj": ["layers.0.feed_forward.w3", "layers.0.feed_forward.w1"],
        "layers.0.feed_forward.net.2": ["layers.0.feed_forward.w2"],
        "noise_refiner.0.feed_forward.net.0.proj": [f"noise_refiner.0.feed_forward.w{i}" for i in (3, 1)],
    },
    "wan": {
        "blocks.0.attn1.to_qkv": [f"{ATTENTION}{x}" for x in "qkv"],
        "blocks.1.attn2.to_kv": [f"blocks.1.cross_attn.{x}" for x in "kv"],
    },
}


def lora_and_truth(naming, family, dense):
    """The file's tensors, with alpha = rank, and the host's weights with the difference added in float64."""
    random, tensors, truth = loras._Random(12, RANK), {}, {}
    for name, hosts in FUSED[family].items():
        weights = [weight_of(dense, host).double() for host in hosts]
        up, down = (t.bfloat16() for t in random.pair(sum(len(w) for w in weights), weights[0].shape[1]))
        module = naming.module(name)
        tensors |= {f"{module}.{naming.up}": up, f"{module}.{naming.down}": down}
        if naming.alpha:
            tensors[f"{module}.alpha"] = torch.tensor(float(RANK))
        first = 0
        for host, weight in zip(hosts, weights, strict=True):
            rows = up[first : first + len(weight)].double()
            truth[host], first = weight + STRENGTH * (rows @ down.double()), first + len(weight)
    return tensors, truth


@pytest.mark.parametrize("naming", ["diffusers", "kohya-diffusers", "peft"])
@pytest.mark.parametrize("family", FUSED)
def test_each_part_gets_its_rows(family, naming, tmp_path):
    model, _, bare = twins_of(family)
    tensors, truth = lora_and_truth(NAMINGS[naming], family, model.dense)
    expected = small.sample(family, with_weights(model.dense, truth))
    assert error(expected, bare) > 1e-3
    joined, report = apply_lora(model.quantized, written(tmp_path, tensors), STRENGTH)
    assert (report.layers, report.tensors, report.unmatched) == (len(truth), len(tensors), ())
    assert_close(small.sample(family, joined), expected, "host_twin")


def in_the_hosts_names(family, folder):
    small.write(family, folder / "base.safetensors")


def in_its_published_layout(family, folder, **options):
    source = folder / "source.safetensors"
    save_file(random_weights(SMALL[family].model()), source)
    plan = make_plan(open_source(source), rank=16, **options)
    stream.quantize(plan, folder / "base.safetensors", stream.Settings("instant"))


def with_fused_linears_in_16_bits(family, folder):
    kept = ("*qkv*", "*net.0.proj")
    in_its_published_layout(family, folder, overrides=tuple((name, "plain") for name in kept))


BASES = [(in_the_hosts_names, family) for family in ("qwen-image", "z-image", "wan")]
BASES += [(in_its_published_layout, family) for family in ("qwen-image", "z-image")]
BASES += [(with_fused_linears_in_16_bits, family) for family in ("qwen-image", "z-image")]
BASES += [pytest.param(in_its_published_layout, "sdxl", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("write", "family"), BASES)
def test_baked_is_applied(write, family, tmp_path):
    write(family, tmp_path)
    path = written(tmp_path, lora_and_truth(NAMINGS["diffusers"], family, twins_of(family)[0].dense)[0])
    baked = bake(tmp_path / "base.safetensors", [(path, 1.0)], tmp_path / "baked.safetensors")
    assert baked.unmatched == ()
    with detecting():
        base, ours = (
            load_model(tmp_path / f"{name}.safetensors", ops=EXACT_ACTIVATIONS) for name in ("base", "baked")
        )
    wanted = small.sample(family, apply_lora(base, path, 1.0)[0])
    assert error(wanted, small.sample(family, base)) > 1e-3
    exact = write is not with_fused_linears_in_16_bits
    assert_close(small.sample(family, ours), wanted, "host_twin" if exact else "host_dense_branch")
