"""Family tables: every name of a full-size checkpoint finds its place, roles are right, odd files are named."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from svdquant_nodes.svdquant.adapters import families
from svdquant_nodes.svdquant.adapters.conventions import holds_shift, straighten, to_engine, unsign
from svdquant_nodes.svdquant.adapters.families import chroma, flux, native, pixart_sigma, t5
from svdquant_nodes.svdquant.adapters.family import (
    Names,
    Role,
    Source,
    apply_role,
    assemble,
    rows_of_share,
    take_share,
)
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.core.weights import GELU_SHIFT
from svdquant_nodes.tests.layers import random_linear
from svdquant_nodes.tests.loaders.made import t5_xxl_shapes
from svdquant_nodes.tests.tolerances import assert_close

DOUBLE = [f"norm1{c}.linear" for c in ("", "_context")]
DOUBLE += [f"{name}{c}" for name in ("qkv_proj", "out_proj") for c in ("", "_context")]
DOUBLE += [f"mlp{c}_{name}" for name in ("fc1", "fc2") for c in ("", "_context")]
SINGLE = ["norm.linear", "qkv_proj", "mlp_fc1", "out_proj", "mlp_fc2"]
V2_DOUBLE = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
}
V2_SINGLE = {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out"}


def flux_names(double=19, single=38, v2=False, guidance=True):
    """Layer and plain names of a published FLUX.1 file, from the format's own tables."""
    layers, norm = [], "attn." if v2 else ""
    plain = [
        f"{m}.{e}"
        for m in ("x_embedder", "context_embedder", "norm_out.linear", "proj_out")
        for e in ("weight", "bias")
    ]
    for embedder in ("timestep", "text", *(("guidance",) if guidance else ())):
        plain += [
            f"time_text_embed.{embedder}_embedder.linear_{i}.{e}" for i in (1, 2) for e in ("weight", "bias")
        ]
    for block, count, names, renamed, norms in (
        ("transformer_blocks", double, DOUBLE, V2_DOUBLE, ("q", "k", "added_q", "added_k")),
        ("single_transformer_blocks", single, SINGLE, V2_SINGLE, ("q", "k")),
    ):
        for i in range(count):
            layers += [f"{block}.{i}.{renamed.get(n, n) if v2 else n}" for n in names]
            plain += [f"{block}.{i}.{norm}norm_{n}.weight" for n in norms]
    return layers, plain


def checkpoint(layers, plain=()):
    return Names(dict.fromkeys(layers), dict.fromkeys(plain))


def host_names(double=19, single=38, guidance=True):
    """Every tensor ComfyUI's Flux class wants, under published names."""
    linears, names = [], []
    for i in range(double):
        for stream in ("img", "txt"):
            d = f"double_blocks.{i}.{stream}"
            linears += [f"{d}_attn.qkv", f"{d}_attn.proj", f"{d}_mlp.0", f"{d}_mlp.2", f"{d}_mod.lin"]
            names += [f"{d}_attn.norm.query_norm.scale", f"{d}_attn.norm.key_norm.scale"]
    for i in range(single):
        s = f"single_blocks.{i}"
        linears += [f"{s}.linear1", f"{s}.linear2", f"{s}.modulation.lin"]
        names += [f"{s}.norm.query_norm.scale", f"{s}.norm.key_norm.scale"]
    plain = ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    for embedder in ("time_in", "vector_in", *(("guidance_in",) if guidance else ())):
        plain += [f"{embedder}.in_layer", f"{embedder}.out_layer"]
    return set(linears), {*names, *(f"{m}.{e}" for m in plain for e in ("weight", "bias"))}


@pytest.mark.parametrize("v2", [False, True], ids=["v1-names", "v2-names"])
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_every_name_of_a_full_size_flux_maps(v2, guidance):
    layers, plain = flux_names(v2=v2, guidance=guidance)
    made = checkpoint(layers, plain)
    family = families.resolve(made)
    assert family is flux.FAMILY
    mapped = family.map_names(made)
    linears, others = host_names(guidance=guidance)
    assert set(mapped.linears) == linears
    assert set(mapped.plain) == others
    assert mapped.left_over == ()
    assert sorted(name for pieces in mapped.linears.values() for name, _ in pieces) == sorted(layers)


def test_split_q_k_v_make_one_fused_layer():
    names = [n for n in flux_names(1, 0, v2=True)[0] if not n.endswith("to_qkv")]
    made = checkpoint(names + [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"])
    pieces = flux.FAMILY.map_names(made).linears["double_blocks.0.img_attn.qkv"]
    assert [name for name, _ in pieces] == [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def test_roles():
    roles = flux.FAMILY.roles(checkpoint(flux_names(1, 1)[0]))
    assert {n.rpartition(".")[2] for n, r in roles.items() if r.act_shift} == {"mlp_fc2", "mlp_context_fc2"}
    assert {n: r.splits for n, r in roles.items() if r.splits} == {
        "transformer_blocks.0.norm1.linear": 6,
        "transformer_blocks.0.norm1_context.linear": 6,
        "single_transformer_blocks.0.norm.linear": 3,
    }


def test_unknown_tensors_are_left_over_not_lost():
    layers, plain = flux_names(1, 1)
    mapped = flux.FAMILY.map_names(
        checkpoint([*layers, "transformer_blocks.0.pulid"], [*plain, "stray.weight"])
    )
    assert mapped.left_over == ("stray.weight", "transformer_blocks.0.pulid")


def test_half_a_layer_is_named():
    layers, _ = flux_names(0, 2)
    layers.remove("single_transformer_blocks.1.mlp_fc1")
    with pytest.raises(
        ValueError, match=r"single_blocks\.1\.linear1: expected 2 .*blocks\.1\.mlp_fc1 missing"
    ):
        flux.FAMILY.map_names(checkpoint(layers))


def test_the_hosts_own_names_are_native():
    made = checkpoint(["double_blocks.0.img_mlp.0"], ["img_in.weight"])
    assert families.resolve(made) is native.FAMILY
    mapped = native.FAMILY.map_names(made)
    assert mapped.linears == {"double_blocks.0.img_mlp.0": (("double_blocks.0.img_mlp.0", Role()),)}
    assert mapped.plain == {"img_in.weight": Source(("img_in.weight",))}


def test_a_share_of_a_dense_linear_keeps_no_other_rows():
    fused = torch.arange(24.0).reshape(12, 2)
    source = Source(("qkv",), partial(rows_of_share, share=(1, 3)), (1, 3))
    mine = source.read({"qkv": fused})
    assert torch.equal(mine, fused[4:8]) and mine.untyped_storage().nbytes() == mine.nbytes


FLUX_LAYERS = ["transformer_blocks.0.norm1_context.linear", "transformer_blocks.0.attn.to_out.0"]
BESIDE = {  # layers whose names several families have, a 16-bit tensor beside them -> the family
    "chroma-of-diffusers": (FLUX_LAYERS[1:], "distilled_guidance_layer.norms.0.weight", chroma.FAMILY),
    "chroma-of-comfyui": (FLUX_LAYERS[1:], "distilled_guidance_layer.norms.0.scale", chroma.FAMILY),
    "flux": (FLUX_LAYERS, "x_embedder.weight", flux.FAMILY),
    "pixart": (["transformer_blocks.0.attn2.to_q"], "pos_embed.proj.weight", pixart_sigma.FAMILY),
    "as-in-pixart": (["transformer_blocks.0.attn2.to_q"], "patchify_proj.weight", native.FAMILY),
    "a-name-that-only-begins-so": (
        ["transformer_blocks.0.attn2.to_q"],
        "pos_embed.proj.weights",
        native.FAMILY,
    ),
}


@pytest.mark.parametrize(("layers", "plain", "family"), BESIDE.values(), ids=BESIDE)
def test_layers_of_several_families_are_known_by_what_is_beside_them(layers, plain, family):
    assert families.resolve(checkpoint(layers, ["proj_out.weight", plain])) is family


def test_no_family():
    assert families.resolve(checkpoint(["decoder.block.0.layer.0.SelfAttention.q"])) is None


@pytest.mark.parametrize("splits", [3, 6])
def test_straighten_undoes_rows_and_plus_one(splits):
    d, k = 8, 64
    weights = random_linear("awq", splits * d, k, seed=1)
    straight = straighten(weights, splits)
    stored, model = reference.dequantize(weights), reference.dequantize(straight)
    for s in range(splits):
        for j in range(d):
            assert torch.equal(model[s * d + j], stored[j * splits + s])
            folded = 1.0 if s in (1, 4) else 0.0
            assert straight.bias[s * d + j] == weights.bias[j * splits + s].float() - folded


@pytest.mark.parametrize(
    ("rows", "changes", "found"),
    [(24, dict(bias=None), "no bias"), (20, {}, "20 rows")],
    ids=["no-bias", "rows-do-not-divide"],
)
def test_what_is_no_modulation_is_refused(rows, changes, found):
    weights = replace(random_linear("awq", rows, 64, seed=1), **changes)
    with pytest.raises(ValueError, match=f"modulation: expected a bias and rows for 6 chunks, got {found}"):
        straighten(weights, 6)


@pytest.mark.parametrize("bias", [0.0, 0.3, None], ids=["no-bias-of-its-own", "a-bias", "none-stored"])
def test_a_bias_shows_whether_a_shift_was_taken_out(bias):
    weights = random_linear("int4", 256, 1024, seed=9)
    own = None if bias is None else bias * torch.randn(256, generator=torch.Generator().manual_seed(1)) + 0.1
    signed = replace(weights, bias=None if own is None else own.to(weights.smooth.dtype))
    role = Role(act_shift=GELU_SHIFT, shift_in_bias=True)
    assert not apply_role(signed, role).spec.act_shift
    shifted = replace(unsign(signed), spec=signed.spec)  # as a file has it
    assert apply_role(shifted, role).spec.act_shift == GELU_SHIFT


def test_rows_that_sum_to_much_alike_hide_no_shift():
    """What all rows have in common says nothing, in the sums as in the bias."""
    weights = random_linear("int4", 256, 1024, seed=9)
    weights = replace(weights, codes=weights.codes & 0x77, scales=weights.scales.abs())  # codes 0..7
    sums = reference.residual(weights).sum(-1)
    assert sums.mean() > 3 * sums.std()
    like_a_shift = (-GELU_SHIFT * sums.mean()).expand(256).to(weights.smooth.dtype)
    assert not holds_shift(replace(weights, bias=like_a_shift))
    assert holds_shift(unsign(replace(weights, bias=like_a_shift)))


def test_the_engines_convention_is_for_its_own_places():
    modulation = random_linear("awq", 24, 64, seed=1, dtype=torch.float32)
    linear = random_linear("int4", 64, 64, seed=2)
    assert to_engine(modulation, 0, 0.0) is modulation and to_engine(linear, 6, 0.0) is linear
    assert to_engine(linear, 0, GELU_SHIFT).spec.act_shift == GELU_SHIFT
    there_and_back = straighten(to_engine(modulation, 6, 0.0), 6)
    assert torch.equal(there_and_back.codes, modulation.codes)
    assert_close(there_and_back.bias, modulation.bias, "fp32_sum")


@pytest.mark.parametrize("which", range(3))
def test_a_share_is_its_rows(which):
    weights = random_linear("int4", 96, 64, seed=1)
    mine = reference.dequantize(weights)[32 * which : 32 * (which + 1)]
    assert torch.equal(reference.dequantize(take_share(weights, (which, 3))), mine)


@pytest.mark.parametrize("true", [dict(out_features=200), dict(in_features=64)], ids=str)
def test_a_role_may_crop_one_side_alone(true):
    cropped = apply_role(random_linear("int4", 256, 128, seed=2), Role(**true))
    assert (cropped.out_features, cropped.in_features) == (
        true.get("out_features", 256),
        true.get("in_features", 128),
    )


def test_role_crops_and_marks_int4_only():
    weights = random_linear("int4", 256, 128, seed=2)
    role = Role(act_shift=GELU_SHIFT, out_features=200, in_features=128)
    applied = apply_role(weights, role)
    assert (applied.out_features, applied.in_features, applied.spec.act_shift) == (200, 128, GELU_SHIFT)
    assert torch.equal(reference.dequantize(applied), reference.dequantize(weights)[:200])
    assert apply_role(random_linear("awq", 12, 64, seed=3), Role(act_shift=GELU_SHIFT)).spec.act_shift == 0.0


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_assemble_places_parts_and_joins_biases(axis):
    pieces = [random_linear("int4", 64, 64, seed=s) for s in (4, 5)]
    parts, bias = assemble(pieces, axis)
    dense = [reference.dequantize(w) for w in pieces]
    assert all(part.weights.bias is None for part in parts)
    if axis == "rows":
        assert [(p.row, p.column) for p in parts] == [(0, 0), (64, 0)]
        assert torch.equal(bias, torch.cat([w.bias for w in pieces]))
    else:
        assert [(p.row, p.column) for p in parts] == [(0, 0), (0, 64)]
        assert torch.equal(bias, pieces[0].bias.float() + pieces[1].bias.float())
    assert [torch.equal(reference.dequantize(p.weights), d) for p, d in zip(parts, dense, strict=True)] == [
        True,
        True,
    ]


def test_every_name_of_a_full_size_t5_keeps_its_name():
    """ComfyUI's T5 has Hugging Face's names; the second copy of the token table is left over."""
    shapes = t5_xxl_shapes()
    layers = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    plain = [name for name in shapes if name.endswith(".weight")]
    found = families.resolve(checkpoint(layers, plain))
    assert found is t5.FAMILY and found.kind == "text encoder"
    mapped = found.map_names(checkpoint(layers, plain))
    assert {host: [name for name, _ in pieces] for host, pieces in mapped.linears.items()} == {
        n: [n] for n in layers
    }
    again = "encoder.embed_tokens.weight"
    assert {host: source.names for host, source in mapped.plain.items()} == {
        n: (n,) for n in plain if n != again
    }
    assert mapped.left_over == (again,)


def test_a_t5_with_one_copy_of_its_table_takes_that():
    names = ["encoder.block.0.layer.0.SelfAttention.q"]
    mapped = t5.FAMILY.map_names(checkpoint(names, ["encoder.embed_tokens.weight"]))
    assert mapped.plain["shared.weight"].names == ("encoder.embed_tokens.weight",) and mapped.left_over == ()
