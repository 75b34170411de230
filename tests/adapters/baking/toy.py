"""The toy checkpoint that the LoRA goldens were made on, and baking into it."""

from __future__ import annotations

from safetensors import safe_open
from safetensors.torch import load_file

from svdquant_nodes.svdquant.adapters.baking import bake
from svdquant_nodes.svdquant.core import tiles
from svdquant_nodes.tests import golden
from svdquant_nodes.tests.loaders import made

GOLDEN = "lora_flux_mini"
D, S = "transformer_blocks.0", "single_transformer_blocks.0"


def make(folder):
    """Write the toy checkpoint with the branches that the LoRA goldens were made on, and their LoRAs."""
    tensors = dict(golden.tensors("mini_flux_int4"))
    for name, tensor in golden.case(GOLDEN, "base").items():
        tensors[name] = packed(name, tensor)
    with safe_open(golden.FOLDER / "mini_flux_int4.safetensors", "pt") as file:
        made.save(folder / "base.safetensors", tensors, file.metadata())
    for i in range(3):
        made.save(folder / f"lora{i}.safetensors", golden.case(GOLDEN, f"lora{i}"))
    return folder


def packed(name, tensor):
    tile = {"lora_down": tiles.tile_down, "lora_up": tiles.tile_up, "bias": tiles.tile_vector}
    tail = name.rpartition(".")[2]
    return tile[tail](tensor) if tail in tile and "norm" not in name else tensor


def run(folder, tmp_path, *loras, base="base", **options):
    baked = bake.bake(
        folder / f"{base}.safetensors",
        [(folder / f"{name}.safetensors", strength) for name, strength in loras],
        tmp_path / "out.safetensors",
        **options,
    )
    return load_file(baked.target), baked


def product(tensors, name):
    down, up = tiles.untile_down(tensors[f"{name}.lora_down"]), tiles.untile_up(tensors[f"{name}.lora_up"])
    return up.double() @ down.double()


def one_layer(folder, name, tensors):
    made.save(folder / f"{name}.safetensors", tensors)
    return name
