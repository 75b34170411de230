"""Every kind of adapter in a baked branch: what its definition says, within a limit that is told, or refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from svdquant_nodes.loaders import natural
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.adapters.baking import adapter, bake
from svdquant_nodes.svdquant.adapters.convert import convert
from svdquant_nodes.tests import layers, lora_oracle
from svdquant_nodes.tests.adapters.baking.toy import D, one_layer, product, run
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tests.tolerances import assert_close


def random(*shape, seed, by=1.0):
    return layers.random(*shape, seed=seed, scale=by)


PAIR = {"lora_up.weight": random(128, 4, seed=1), "lora_down.weight": random(4, 128, seed=2, by=0.1)}
GLORA = {"a1": (128, 4), "a2": (4, 128), "b1": (128, 4), "b2": (4, 128)}
ADAPTERS = {
    "lora": {**PAIR, "alpha": torch.tensor(2.0)},
    "loha": {
        f"hada_w{i}_{x}": random(*s, seed=i) for i in (1, 2) for x, s in (("a", (128, 3)), ("b", (3, 128)))
    },
    "loha-of-high-rank": {
        f"hada_w{i}_{x}": random(*s, seed=i) for i in (1, 2) for x, s in (("a", (128, 12)), ("b", (12, 128)))
    },
    "lokr-thin": {
        "lokr_w1": random(8, 8, seed=1),
        "lokr_w2_a": random(16, 2, seed=2),
        "lokr_w2_b": random(2, 16, seed=3),
    },
    "lokr-whole": {"lokr_w1": random(8, 4, seed=1), "lokr_w2": random(16, 32, seed=2)},
    "glora": {f"{n}.weight": random(*s, seed=i, by=0.2) for i, (n, s) in enumerate(GLORA.items())},
    "difference": {"diff": random(128, 20, seed=1) @ random(20, 128, seed=2)},
    "dora": {**PAIR, "dora_scale": random(128, 1, seed=3).abs()},
    "dora-by-columns": {**PAIR, "dora_scale": random(1, 128, seed=3).abs()},
    "dora-of-loha": {
        f"hada_w{i}_{x}": random(*s, seed=i) for i in (1, 2) for x, s in (("a", (128, 2)), ("b", (2, 128)))
    }
    | {"dora_scale": random(128, 1, seed=3).abs()},
    "dora-of-glora": {
        **{f"{n}.weight": random(*s, seed=i, by=0.2) for i, (n, s) in enumerate(GLORA.items())},
        "dora_scale": random(128, 1, seed=3).abs(),
    },
    "lora-tucker": {**PAIR, "lora_mid.weight": random(4, 4, 1, 1, seed=5), "alpha": torch.tensor(2.0)},
    "loha-tucker": {
        f"hada_{x}": random(*s, seed=i)
        for i, (x, s) in enumerate(
            {
                **{f"w{j}_{x}": (3, 128) for j in (1, 2) for x in "ab"},
                "t1": (3, 3, 1, 1),
                "t2": (3, 3, 1, 1),
            }.items()
        )
    },
    "lokr-tucker": {
        "lokr_w1": random(8, 8, seed=1),
        "lokr_w2_a": random(2, 16, seed=2),
        "lokr_w2_b": random(2, 16, seed=3),
        "lokr_t2": random(2, 2, 1, 1, seed=4),
        "alpha": torch.tensor(1.0),
    },
    "boft": {"oft_blocks": random(3, 8, 16, 16, seed=4, by=0.1), "alpha": torch.tensor(0.0)},
    "boft-bounded-rescaled": {
        "oft_blocks": random(2, 8, 16, 16, seed=4, by=0.1),
        "alpha": torch.tensor(0.5),
        "rescale": 1 + random(128, 1, seed=6, by=0.1),
    },
    "oft": {"oft_blocks": random(8, 16, 16, seed=4, by=0.1)},
    "oft-bounded": {"oft_blocks": random(8, 16, 16, seed=4, by=0.1), "alpha": torch.tensor(0.5)},
}
PROJ = f"{D}.attn.to_out.0", f"{D}.out_proj"  # as a LoRA calls it, as the file does


@pytest.mark.parametrize("members", ADAPTERS.values(), ids=ADAPTERS)
def test_every_adapter_up_to_the_rounding_of_the_branch(folder, tmp_path, members):
    """128 ranks hold any difference of a 128 x 128 layer: what is added is what the definition says."""
    added, baked, weight = added_to_proj(folder, tmp_path, members, 0.7, limit=1e-4)
    assert_close(added, lora_oracle.difference(members, weight, 0.7), "two_bf16_factors")
    assert max(baked.errors.values(), default=0.0) <= 1e-4
    assert ("exact" in str(baked)) == (not baked.errors)


def added_to_proj(folder, tmp_path, members, strength, **options):
    """What baking adds to one layer, in float64; what was reported; the layer's weight before."""
    name = one_layer(folder, "one", {f"{PROJ[0]}.{tail}": t for tail, t in members.items()})
    out, baked = run(folder, tmp_path, (name, strength), **options)
    before = open_checkpoint(folder / "base.safetensors")
    added = product(out, PROJ[1]) - product(before.stored, PROJ[1])
    return added, baked, layers.dense(before.layers[PROJ[1]])


def test_what_looks_at_the_weight_sees_the_loras_before_it(folder, tmp_path):
    first = one_layer(folder, "first", {f"{PROJ[0]}.{t}": x for t, x in PAIR.items()})
    second = one_layer(folder, "second", {f"{PROJ[0]}.{t}": x for t, x in ADAPTERS["glora"].items()})
    out, _ = run(folder, tmp_path, (first, 1.0), (second, 0.5))
    before = open_checkpoint(folder / "base.safetensors")
    weight = layers.dense(before.layers[PROJ[1]])
    expected = lora_oracle.difference(PAIR, weight, 1.0)
    expected = expected + lora_oracle.difference(ADAPTERS["glora"], weight + expected, 0.5)
    assert_close(product(out, PROJ[1]) - product(before.stored, PROJ[1]), expected, "two_bf16_factors")


def test_a_16_bit_layer_takes_any_difference(folder, tmp_path):
    before = load_file(folder / "base.safetensors")["proj_out.weight"]
    delta = random(*before.shape, seed=1, by=0.01)
    out, baked = run(folder, tmp_path, (one_layer(folder, "dense", {"proj_out.diff": delta}), 2.0))
    assert_close(out["proj_out.weight"], before.double() + 2 * delta.double(), "bf16_output")
    assert baked.errors == {}


class TestALimitOfTheError:
    """A branch of 32 ranks in the place of one of 1024."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(adapter, "MAX_RANK", 32)

    noisy = {"diff": random(128, 8, seed=1) @ random(8, 128, seed=2) + random(128, 128, seed=3, by=0.1)}
    lokr = {"lokr_w1": torch.diag(torch.tensor([1.0, 1e-2])), "lokr_w2": random(64, 64, seed=2)}

    @pytest.mark.parametrize("members", [noisy, lokr], ids=["difference", "lokr"])
    def test_beyond_it_is_refused_with_the_figures(self, folder, tmp_path, members):
        with pytest.raises(
            ValueError, match=r"within 0\.10% of it only at rank \d+, and at 32, .*% off\. Apply"
        ):
            added_to_proj(folder, tmp_path, members, 1.0, limit=1e-3)
        assert list(tmp_path.iterdir()) == []

    def test_within_it_is_taken_and_the_error_told(self, folder, tmp_path):
        added, baked, _ = added_to_proj(folder, tmp_path, self.noisy, 1.0, limit=0.1)
        exact = self.noisy["diff"].double()
        error = float((added - exact).norm() / exact.norm())
        [(layer, told)] = baked.errors.items()
        assert layer == "double_blocks.0.img_attn.proj"
        assert told == pytest.approx(error, rel=0.02) and 0.01 < told < 0.1
        assert f"1 layers not low-rank, largest error {told:.2%} ({layer})" in str(baked)

    def test_a_kronecker_product_loses_its_smallest_values(self, folder, tmp_path):
        """Second singular value a hundredth of the first: half of the ranks, 1 % of the norm."""
        lokr = {"lokr_w1": self.lokr["lokr_w1"], "lokr_w2": random(64, 24, seed=2) @ random(24, 64, seed=3)}
        added, baked, weight = added_to_proj(folder, tmp_path, lokr, 1.0, limit=0.02)
        assert baked.added == 24
        assert max(baked.errors.values()) == pytest.approx(1e-2, rel=0.01)
        exact = torch.from_numpy(lora_oracle.difference(lokr, weight, 1.0))
        assert float((added - exact).norm() / exact.norm()) == pytest.approx(1e-2, rel=0.1)


@pytest.mark.parametrize("dialect", ["natural", "kitchen"])
def test_a_base_in_another_dialect_is_converted_first(folder, tmp_path, dialect):
    base = folder / f"{dialect}.safetensors"
    if not base.exists():
        convert(open_checkpoint(folder / "base.safetensors"), base, dialect)
    expected, _ = run(folder, tmp_path, ("lora1", 0.8), ("lora2", -0.5))
    (tmp_path / "out.safetensors").unlink()
    (tmp_path / "out-rest.safetensors").unlink()
    out, baked = run(folder, tmp_path, ("lora1", 0.8), ("lora2", -0.5), base=dialect)
    assert open_checkpoint(baked.target).dialect == "nunchaku_v1"
    assert [name for name, t in expected.items() if not made.same(out[name], t)] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-rest.safetensors", "out.safetensors"]


def test_a_family_without_a_nunchaku_layout_stays_natural(tmp_path):
    """ComfyUI's own names: no table says which activations are shifted, so the file has to."""
    stored = {
        "blocks.0.ffn.0": no_bias(layers.random_linear("int4", 80, 64, 16)),
        "blocks.0.ffn.2": no_bias(layers.random_linear("int4-unsigned", 64, 128, 8, seed=5)),
    }
    natural.write(tmp_path / "wan.safetensors", stored, {"head.weight": torch.ones(4, 4)}, {})
    up, down = random(64, 4, seed=1), random(4, 128, seed=2)
    lora = {
        "diffusion_model.blocks.0.ffn.2.lora_B.weight": up,
        "diffusion_model.blocks.0.ffn.2.lora_A.weight": down,
    }
    made.save(tmp_path / "lora.safetensors", lora)
    baked = bake.bake(
        tmp_path / "wan.safetensors", [(tmp_path / "lora.safetensors", 0.5)], tmp_path / "out.safetensors"
    )
    found = open_checkpoint(baked.target)
    assert (found.dialect, baked.rank, baked.layers) == ("natural", 12, 1)
    wider, same = found.layers["blocks.0.ffn.2"], found.layers["blocks.0.ffn.0"]
    assert wider.spec.act_shift == stored["blocks.0.ffn.2"].spec.act_shift
    assert torch.equal(wider.codes, stored["blocks.0.ffn.2"].codes)
    assert torch.equal(wider.up[:, 8:], up.bfloat16())
    assert torch.equal(wider.down[8:], (down * 0.5).bfloat16())
    assert torch.equal(same.down, stored["blocks.0.ffn.0"].down)


def no_bias(weights):
    return dataclasses.replace(weights, bias=None)


REFUSED = {
    "size": ({**PAIR, "lora_up.weight": torch.ones(64, 4)}, r"expected \[128, 128\], got \[64, 128\]"),
    "inner": ({**PAIR, "lora_up.weight": torch.ones(128, 3)}, "expected them to share their inner size"),
    "glora": (
        {f"{n}.weight": torch.ones(4, 4) for n in GLORA},
        "expected an adapter that can be baked, got a1",
    ),
    "boft-of-another-height": (
        {"oft_blocks": torch.ones(2, 4, 16, 16)},
        "expected an adapter that can be baked, got oft_blocks",
    ),
    "boft-of-too-many-stages": (
        {"oft_blocks": torch.ones(5, 8, 16, 16)},
        "expected an adapter that can be baked, got oft_blocks",
    ),
    "tucker-core": (
        {**PAIR, "lora_mid.weight": torch.ones(3, 3, 1, 1)},
        "expected them to share their inner size",
    ),
    "rank": (
        {"lora_down.weight": torch.ones(1100, 128), "lora_up.weight": torch.ones(128, 1100)},
        "expected a rank up to 1024, got 1120",
    ),
}


@pytest.mark.parametrize(("members", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(folder, tmp_path, members, message):
    name = one_layer(folder, "bad", {f"{D}.attn.to_out.0.{tail}": t for tail, t in members.items()})
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path, (name, 1.0))
    assert list(tmp_path.iterdir()) == []
