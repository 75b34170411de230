"""Baking a LoRA gives the file that the reference converter and composer would give, to the byte.

Where the two differ on purpose, a test says why the mathematics wins.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from svdquant_nodes.loaders import natural
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.adapters.baking import bake, tensors
from svdquant_nodes.svdquant.core import tiles
from svdquant_nodes.svdquant.core.weights import AWQ, INT4
from svdquant_nodes.tests import golden
from svdquant_nodes.tests.adapters.baking.toy import GOLDEN, D, S, one_layer, product, run
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tests.tolerances import assert_close
from svdquant_nodes.tools.commands import bake_lora

MAPS = Path("/proc/self/maps")


def branches(case):
    """The W4A4 layers of a golden case; modulation layers have no branch to compare."""
    return {
        n: t
        for n, t in golden.case(GOLDEN, case).items()
        if ".lora_" in n and "norm" not in n and "weight" not in n
    }


def test_conversion_to_the_byte(folder, tmp_path):
    out, baked = run(folder, tmp_path, ("lora0", 1.0))
    expected = branches("conv0")
    assert len(expected) == 20
    assert [name for name, t in expected.items() if not made.same(out[name], t)] == []
    assert (baked.layers, baked.rank) == (9, 32)


def test_composition_to_the_byte(folder, tmp_path):
    out, _ = run(folder, tmp_path, ("lora1", 0.8), ("lora2", -0.5))
    expected = branches("conv_composed")
    assert len(expected) == 8
    assert [name for name, t in expected.items() if not made.same(out[name], t)] == []


def test_vectors_at_half_strength_to_the_byte(folder, tmp_path):
    """Norm weights replace and are never scaled; biases are differences, in the engine's order."""
    out, _ = run(folder, tmp_path, ("lora0", 0.5))
    expected = golden.case(GOLDEN, "fused_vec_0.5")
    assert len(expected) == 11
    assert [name for name, t in expected.items() if not made.same(out[name], t)] == []


@pytest.mark.parametrize("v2", [False, True], ids=["v1-names", "v2-names"])
def test_a_layer_without_a_branch_gets_one(folder, tmp_path, v2):
    """Under the names that its file's other layers have."""
    out, _ = run(folder, tmp_path, ("lora1", 0.8))
    names = {"lora_down": "proj_down", "lora_up": "proj_up"} if v2 else {}
    stored = load_file(folder / "base.safetensors")
    name = next(n for n in out if n.endswith(".lora_down") and not made.same(out[n], stored[n]))
    layer = name.removesuffix(".lora_down")
    for end in ("lora_down", "lora_up"):
        del stored[f"{layer}.{end}"]
    bare = made.save(tmp_path / "bare.safetensors", made.as_v2(stored) if v2 else stored)
    found = load_file(
        bake.bake(bare, [(folder / "lora1.safetensors", 0.8)], tmp_path / "b.safetensors").target
    )
    down, up = (found[f"{layer}.{names.get(end, end)}"] for end in ("lora_down", "lora_up"))
    got = tiles.untile_up(up).double() @ tiles.untile_down(down).double()
    assert_close(
        got, product(out, layer) - product(load_file(folder / "base.safetensors"), layer), "two_bf16_factors"
    )


def test_v2_names_want_one_rank_for_all_branches_and_none_beside_modulation(folder, tmp_path):
    before = made.as_v2(load_file(folder / "base.safetensors"))
    widest, other = f"{D}.qkv_proj_context", f"{D}.mlp_context_fc1"  # the LoRA is about neither
    for end in ("down", "up"):
        before[f"{widest}.proj_{end}"] = before[f"{widest}.proj_{end}"].repeat(1, 3)
    base = made.save(tmp_path / "v2.safetensors", before)
    out = load_file(bake.bake(base, [(folder / "lora1.safetensors", 0.8)], tmp_path / "b.safetensors").target)
    assert set(out) == set(before)
    assert {t.shape[1] for name, t in out.items() if name.endswith(("proj_down", "proj_up"))} == {48}
    down = tiles.untile_down(out[f"{other}.proj_down"])
    assert torch.equal(down[:16], tiles.untile_down(before[f"{other}.proj_down"]))
    assert not bool(down[16:].any())


BIASES = {  # what a LoRA calls a layer -> the rows of its bias that each stored linear takes, and where
    f"{S}.attn.to_k": {f"{S}.qkv_proj": (0, 128, 128)},
    f"{S}.proj_mlp": {f"{S}.mlp_fc1": (0, 256, 0)},
    "diffusion_model.single_blocks.0.linear1": {
        f"{S}.qkv_proj": (0, 384, 0),
        f"{S}.mlp_fc1": (384, 640, 0),
    },
    f"{S}.proj_out": {f"{S}.out_proj": (0, 128, 0)},  # of two biases that are summed
}


@pytest.mark.parametrize(
    ("name", "taken"), BIASES.items(), ids=["of-fused", "behind-fused", "of-two", "summed"]
)
def test_a_bias_goes_where_its_rows_are_and_nowhere_else(folder, tmp_path, name, taken):
    difference = torch.linspace(1, 2, max(end for _, end, _ in taken.values())).bfloat16()
    out, _ = run(folder, tmp_path, (one_layer(folder, "bias", {f"{name}.diff_b": difference}), 1.0))
    before = load_file(folder / "base.safetensors")
    assert {n for n in out if not made.same(out[n], before[n])} == {f"{layer}.bias" for layer in taken}
    for layer, (begin, end, at) in taken.items():
        want = tiles.untile_vector(before[f"{layer}.bias"]).clone()
        want[at : at + end - begin] += difference[begin:end]
        assert torch.equal(tiles.untile_vector(out[f"{layer}.bias"]), want)


def test_a_layer_of_which_a_lora_changes_nothing_gets_no_rank(folder, tmp_path):
    """A LoRA for q, k, v and MLP at once, trained on q, k and v alone."""
    up = torch.cat([torch.ones(384, 4), torch.zeros(256, 4)])
    pair = {"lora_up.weight": up, "lora_down.weight": torch.ones(4, 128)}
    name = one_layer(
        folder, "qkv", {f"diffusion_model.single_blocks.0.linear1.{n}": t for n, t in pair.items()}
    )
    out, baked = run(folder, tmp_path, (name, 1.0))
    assert baked.layers == 1 and out[f"{S}.mlp_fc1.lora_up"].shape == (256, 16)


def test_nothing_else_changes(folder, tmp_path):
    out, _ = run(folder, tmp_path, ("lora1", 0.8))
    before = load_file(folder / "base.safetensors")
    assert set(out) == set(before)
    changed = {name for name in out if not made.same(out[name], before[name])}
    layers = (f"{D}.qkv_proj", *(f"{S}.{name}" for name in ("qkv_proj", "out_proj", "mlp_fc2", "mlp_fc1")))
    touched = {f"{layer}.lora_{end}" for layer in layers for end in ("down", "up")}
    assert changed == touched


def test_16_bit_layers_take_their_part(folder, tmp_path):
    out, _ = run(folder, tmp_path, ("lora0", 1.0))
    lora = golden.case(GOLDEN, "lora0.transformer.proj_out")
    exact = load_file(folder / "base.safetensors")["proj_out.weight"].double()
    exact = exact + lora["lora_B.weight"].double() @ lora["lora_A.weight"].double()
    assert_close(out["proj_out.weight"], exact, "bf16_output")


def test_modulation_goes_beside_as_a_lora(folder, tmp_path):
    """AWQ layers have no branch, and codes of 4 bits would swallow the LoRA: neither rounded away nor dropped."""
    _, baked = run(folder, tmp_path, ("lora1", 0.8), ("lora2", -0.5))
    assert baked.rest == tmp_path / "out-rest.safetensors"
    rest = load_file(baked.rest)
    name = "diffusion_model.double_blocks.0.img_mod.lin"
    got = rest[f"{name}.lora_up.weight"].double() @ rest[f"{name}.lora_down.weight"].double()
    assert set(rest) == {f"{name}.lora_up.weight", f"{name}.lora_down.weight"}
    stored = golden.case(GOLDEN, f"conv_composed.{D}.norm1.linear")
    up = stored["lora_up"].reshape(128, 6, 16).transpose(0, 1).reshape(768, 16).double()
    assert torch.equal(got, up @ stored["lora_down"].double())
    assert "1 layers have no branch to fold into: apply out-rest.safetensors beside it" in str(baked)


def test_metadata_states_the_rank_and_what_was_baked(folder, tmp_path):
    _, baked = run(folder, tmp_path, ("lora0", 1.0))
    checkpoint = open_checkpoint(baked.target)
    assert checkpoint.warnings == ()
    assert json.loads(checkpoint.metadata["quantization_config"])["rank"] == 32
    assert checkpoint.metadata["baked_loras"] == "lora0.safetensors:1"


def test_the_rank_stated_is_that_of_most_branches():
    """Modulation layers have none, and are more than the others here."""
    int4, awq = SimpleNamespace(spec=INT4, rank=16), SimpleNamespace(spec=AWQ, rank=0)
    info = {"qkv": int4, "fc1": int4, "fc2": int4, **{f"norm{i}": awq for i in range(4)}}
    checkpoint = SimpleNamespace(info=info, metadata={"quantization_config": '{"rank": 16}'})
    grown = {"fc1": ([], 32), "fc2": ([], 32)}
    said = tensors.metadata(checkpoint, grown, [(Path("a.safetensors"), 0.5)])
    assert said == {"quantization_config": '{"rank": 32}', "baked_loras": "a.safetensors:0.5"}


def test_baking_twice_is_baking_both(folder, tmp_path):
    both, _ = run(folder, tmp_path, ("lora1", 1.0), ("lora2", 1.0))
    first = bake.bake(
        folder / "base.safetensors", [(folder / "lora1.safetensors", 1.0)], tmp_path / "1.safetensors"
    )
    second = bake.bake(first.target, [(folder / "lora2.safetensors", 1.0)], tmp_path / "2.safetensors")
    again = load_file(second.target)
    said = open_checkpoint(second.target).metadata["baked_loras"]
    assert said == "lora1.safetensors:1, lora2.safetensors:1"
    for name in (f"{D}.qkv_proj", f"{S}.out_proj"):
        products = [product(t, name) for t in (both, again)]
        assert torch.equal(*products)


class TestTheMathematicsWins:
    """Where the reference converter is known to fail or to be wasteful."""

    def test_a_missing_member_of_qkv_costs_no_rank(self, folder, tmp_path):
        """It repeats q's A for the missing v: rank 12 for what is rank 8."""
        lora = golden.case(GOLDEN, f"lora0.transformer.{D}.attn")
        names = [n for n in lora if n.startswith(("to_q.lora", "to_k.lora")) and "bias" not in n]
        kept = {f"{D}.attn.{n}": lora[n] for n in names}
        out, _ = run(folder, tmp_path, (one_layer(folder, "qk", kept), 1.0))
        down = tiles.untile_down(out[f"{D}.qkv_proj.lora_down"])
        assert down.shape[0] == 32 and int((down != 0).any(1).sum()) == 16 + 8

    def test_mlp_without_its_other_half(self, folder, tmp_path):
        """It stops with an assertion; fc2 then only gets as many ranks as fc1, all zero."""
        lora = golden.case(GOLDEN, f"lora0.transformer.{D}.ff.net.0.proj")
        kept = {f"{D}.ff.net.0.proj.{n}": t for n, t in lora.items() if "bias" not in n}
        out, _ = run(folder, tmp_path, (one_layer(folder, "fc1", kept), 1.0))
        base = golden.case(GOLDEN, f"base.{D}.mlp_fc2")
        assert torch.equal(tiles.untile_down(out[f"{D}.mlp_fc2.lora_down"])[:16], base["lora_down"])
        assert int(tiles.untile_up(out[f"{D}.mlp_fc2.lora_up"])[:, 16:].count_nonzero()) == 0
        assert out[f"{D}.mlp_fc1.lora_down"].shape == (128, 32)

    def test_single_out_without_its_mlp(self, folder, tmp_path):
        """It stops with a KeyError."""
        lora = golden.case(GOLDEN, f"lora0.transformer.{S}.proj_out")
        name = one_layer(folder, "out", {f"{S}.proj_out.{n}": t for n, t in lora.items()})
        out, baked = run(folder, tmp_path, (name, 1.0))
        assert baked.layers == 3  # out_proj, mlp_fc2, and mlp_fc1 for its rank
        assert torch.equal(
            tiles.untile_down(out[f"{S}.out_proj.lora_down"])[16:20], lora["lora_A.weight"][:, :128]
        )

    @pytest.mark.parametrize("strength", [0.999999, 0.5, -1.0])
    def test_every_strength_counts(self, folder, tmp_path, strength):
        """It takes any strength below 1 for 1 where the file is already in its layout."""
        out, _ = run(folder, tmp_path, ("lora1", strength))
        lora = golden.case(GOLDEN, f"lora1.transformer.{S}.proj_out")
        wanted = (lora["lora_A.weight"].float() * strength).bfloat16()[:, :128]
        assert torch.equal(tiles.untile_down(out[f"{S}.out_proj.lora_down"])[16:20], wanted)


def test_refused_files(folder, tmp_path):
    one_layer(folder, "sdxl", {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(2, 2)})
    with pytest.raises(
        ValueError, match=r"sdxl\.safetensors: none of its 1 tensors.*It looks like a LoRA for SDXL"
    ):
        run(folder, tmp_path, ("sdxl", 1.0))
    one_layer(folder, "engine", {f"{D}.qkv_proj.lora_down": torch.ones(16, 16)})
    with pytest.raises(ValueError, match="Bake the original LoRA file"):
        run(folder, tmp_path, ("engine", 1.0))
    (tmp_path / "out.safetensors").touch()
    with pytest.raises(ValueError, match="expected a new file, got one that is there"):
        run(folder, tmp_path, ("lora1", 1.0))


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells what is mapped")
@pytest.mark.parametrize("fails", [False, True], ids=["baked", "refused"])
def test_the_converted_file_is_let_go_before_it_is_removed(folder, tmp_path, monkeypatch, fails):
    """Windows removes no file that is mapped into memory."""
    mapped = []

    class Scratch(TemporaryDirectory):
        def cleanup(self):
            mapped.append(self.name in MAPS.read_text())
            super().cleanup()

    monkeypatch.setattr(bake, "TemporaryDirectory", Scratch)
    monkeypatch.setattr(Scratch, "__exit__", lambda self, *_: self.cleanup())
    source = open_checkpoint(folder / "base.safetensors")
    natural.write(tmp_path / "natural.safetensors", source.layers, source.plain, source.metadata)
    if fails:
        monkeypatch.setattr(
            bake, "branch_tensors", lambda source, grown: source.stored_pair(next(iter(grown))) / 0
        )
    with pytest.raises(TypeError) if fails else nullcontext():
        bake.bake(
            tmp_path / "natural.safetensors",
            [(folder / "lora1.safetensors", 1.0)],
            tmp_path / "out.safetensors",
        )
    assert mapped == [False] and (tmp_path / "out.safetensors").exists() != fails


@pytest.mark.parametrize("where", ["target", "rest"])
def test_a_folder_that_is_not_there_is_told_before_anything_is_written(folder, tmp_path, where):
    paths = {"target": tmp_path / "out.safetensors", "rest": tmp_path / "rest.safetensors"}
    paths[where] = tmp_path / "no" / paths[where].name
    with pytest.raises(ValueError, match=f"{paths[where].name}: expected a folder .*no, got none"):
        bake.bake(folder / "base.safetensors", [(folder / "lora1.safetensors", 1.0)], **paths)
    assert not list(tmp_path.rglob("*.safetensors.part"))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), float("-inf")])
def test_a_strength_that_is_no_number_is_refused(folder, tmp_path, strength):
    with pytest.raises(
        ValueError, match=r"lora1\.safetensors: expected a strength such as 1, got -?(nan|inf)"
    ):
        run(folder, tmp_path, ("lora1", strength))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [float("nan"), -0.1, 1.0])
def test_a_limit_that_is_none_is_refused(folder, tmp_path, limit):
    with pytest.raises(ValueError, match=r"error: expected a relative error from 0 to below 1"):
        run(folder, tmp_path, ("lora1", 1.0), limit=limit)


@pytest.mark.parametrize(
    ("argument", "name", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("C:/a.safetensors", "C:/a.safetensors", 1.0),
        ("C:/a.safetensors:-2", "C:/a.safetensors", -2.0),
    ],
)
def test_arguments(argument, name, strength):
    path, by = bake_lora.parse(argument)
    assert (path.as_posix(), by) == (name, strength)


def test_argument_with_no_number():
    with pytest.raises(ValueError, match="expected a number after the colon, got 'half'"):
        bake_lora.parse("a.safetensors:half")


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "/a", "C:a", "a\\b", "a?"])
def test_new_file_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="expected the plain name of a file"):
        bake.new_file(tmp_path, name)
