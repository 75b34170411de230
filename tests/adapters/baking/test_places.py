"""Where names of LoRA files lead in a stored checkpoint, whichever way it stores q, k and v."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from svdquant_nodes.svdquant.adapters.baking.places import Place, names_of, pieces_of
from svdquant_nodes.svdquant.adapters.families import flux, sdxl

D = 64  # width of the model; the MLP of a single block is four times as wide
B, S = "transformer_blocks.3.", "single_transformer_blocks.5."
MLP = {S + "mlp_fc1": (4 * D, D)}
FUSED = {B + "qkv_proj": (3 * D, D), S + "qkv_proj": (3 * D, D), **MLP}
APART = {f"{B}attn.to_{x}": (D, D) for x in "qkv"}
APART |= {f"{S}attn.to_{x}": (D, D) for x in "qkv"} | {S + "proj_mlp": (4 * D, D)}


def checkpoint(sizes):
    info = {name: SimpleNamespace(out_features=n, in_features=k) for name, (n, k) in sizes.items()}
    return SimpleNamespace(info=info, plain_info={}, dialect="nunchaku_lite")


@pytest.mark.parametrize("sizes", [FUSED, APART], ids=["stored-fused", "stored-apart"])
def test_every_name_of_q_k_and_v(sizes):
    stored = checkpoint(sizes)
    known = names_of(stored, flux.FAMILY, flux.FAMILY.map_names(stored))
    double, single = "double_blocks.3.img_attn.qkv", "single_blocks.5.linear1"
    rows = {
        "double_blocks.3.img_attn.qkv": (double, 0, 3 * D),
        B + "qkv_proj": (double, 0, 3 * D),
        B + "attn.to_qkv": (double, 0, 3 * D),
        B + "attn.to_q": (double, 0, D),
        B + "attn.to_k": (double, D, 2 * D),
        B + "attn.to_v": (double, 2 * D, 3 * D),
        "single_blocks.5.linear1": (single, 0, 7 * D),
        S + "attn.to_qkv": (single, 0, 3 * D),
        S + "attn.to_k": (single, D, 2 * D),
        S + "proj_mlp": (single, 3 * D, 7 * D),
        S + "mlp_fc1": (single, 3 * D, 7 * D),
    }
    for name, (host, first, last) in rows.items():
        place = Place(host, (first, last), (0, D))
        assert known[f"diffusion_model.{name}"] == place, name
        assert known[f"lora_unet_{name.replace('.', '_')}"] == place, name


def test_a_layer_beside_another_has_its_columns():
    stored = checkpoint({S + "out_proj": (D, D), S + "mlp_fc2": (D, 4 * D)})
    known = names_of(stored, flux.FAMILY, flux.FAMILY.map_names(stored))
    host = "single_blocks.5.linear2"
    assert known[f"diffusion_model.{S}proj_out"] == Place(host, (0, D), (0, 5 * D))
    assert known[f"diffusion_model.{S}mlp_fc2"] == Place(host, (0, D), (D, 5 * D))


def test_hosts_that_share_a_stored_layer_take_its_rows_in_turn():
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1."
    stored = checkpoint({block + "to_qkv": (3 * D, D)})
    mapped = sdxl.FAMILY.map_names(stored)
    found = {host.rpartition(".")[2]: pieces_of(stored, mapped, host) for host in mapped.linears}
    assert {end: (piece.first, piece.rows) for end, (piece,) in found.items()} == {
        "to_q": (0, slice(0, D)),
        "to_k": (D, slice(0, D)),
        "to_v": (2 * D, slice(0, D)),
    }
