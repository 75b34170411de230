"""A thousand random LoRA files: each gives the exact result, or a sentence that names the file."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.adapters import layout
from svdquant_nodes.svdquant.adapters.baking.bake import bake
from svdquant_nodes.svdquant.adapters.baking.base import Base
from svdquant_nodes.svdquant.adapters.lora import joining
from svdquant_nodes.svdquant.adapters.lora.apply import apply_lora
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.tests.inside_host import lora_dice, loras
from svdquant_nodes.tests.inside_host.lora_dice import Dice
from svdquant_nodes.tests.inside_host.twins import DEMO_INT4, sample
from svdquant_nodes.tests.tolerances import assert_close

CPU = torch.device("cpu")
THROWS, A_BATCH = 1000, 100


@pytest.fixture(scope="module")
def layers(quantized):
    return {
        key.removeprefix("diffusion_model.").removesuffix(".weight"): layer
        for key, layer in quantized_linears(quantized.model)
    }


@pytest.fixture(scope="module")
def weights(layers):
    """Every layer's dense weight, in float64."""
    return {
        name: layout.dense(layout.unpack(l.weight._qdata, l.weight._params), tuple(l.weight.shape), None)[0]
        .double()
        .numpy()
        for name, l in layers.items()
    }


def added(layer, branches) -> np.ndarray:
    """What branches add to a layer's weight, in float64."""
    total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for b in branches:
        product = b.down.double() if b.up is None else b.up.double() @ b.down.double()
        product = product if b.kron is None else torch.kron(b.kron.double(), product)
        total[b.rows, b.columns] += b.strength * product
    return total.numpy()


def tolerance(name, made, found) -> str:
    """Whole differences are kept in the host's 16-bit LoRA dtype; pairs and Kronecker products are not rounded."""
    if found.dense or found.error:
        return "host_dense_branch"
    reduced = any(host == name and "diff" in members for host, _, members in made.layers)
    return "fp32_svd" if reduced else "fp32_sum"


def judge(model, made, path, layers, weights) -> str:
    """What became of one file: refused or exact; anything else fails."""
    save_file({name: t.contiguous().clone() for name, t in made.tensors.items()}, path)
    if made.fault:
        with pytest.raises(ValueError, match=rf"^{path.name}: "):
            apply_lora(model, path, made.strength)
        return made.fault
    joined, report = apply_lora(model, path, made.strength)
    assert report.naming != "unknown"
    wanted = made.differences(weights.__getitem__)
    assert {key.split("diffusion_model.")[1].removesuffix(".weight") for key in joined.patches} == set(wanted)
    for name, difference in wanted.items():
        key = f"diffusion_model.{name}.weight"
        found = joining.join(layers[name], key, joined.patches[key], CPU)
        assert not found.misfit
        assert_close(added(layers[name], found.branches), difference, tolerance(name, made, found))
    return "exact"


def test_the_dice_show_every_face(monkeypatch):
    """Every naming, adapter, rank, alpha and fault comes up at least twenty times in a thousand throws."""
    thrown = Counter()
    monkeypatch.setattr(
        Dice, "numbers", lambda self, *shape, by=1, dtype=torch.float32: torch.empty(shape, dtype=dtype)
    )
    for seed in range(THROWS):
        dice = Dice(seed)
        dice.throw()
        thrown.update(map(str, dice.thrown))
    faces = [*lora_dice.NAMINGS, *lora_dice.RANKS, *lora_dice.KINDS, *lora_dice.ALPHAS, *lora_dice.SPOILINGS]
    assert [face for face in faces if thrown[str(face)] < 20] == []


@pytest.mark.parametrize("batch", range(THROWS // A_BATCH))
def test_exact_or_refused(quantized, layers, weights, tmp_path, batch):
    outcomes = Counter()
    for i in range(A_BATCH):
        seed = batch * A_BATCH + i
        made = Dice(seed).throw()
        try:
            outcomes[judge(quantized, made, tmp_path / "random.safetensors", layers, weights)] += 1
        except BaseException as error:
            error.add_note(
                f"seed {seed}, fault {made.fault!r}: {[(n, tuple(t.shape)) for n, t in made.tensors.items()]}"
            )
            raise
    assert outcomes["exact"] > A_BATCH / 2 and len(outcomes) > 3, outcomes


@pytest.mark.parametrize("seed", range(3000, 3024))
def test_through_the_sampler(twins, tmp_path, seed):
    """The same on the whole: our node against a difference that the host merges into the dense twin."""
    made = Dice(seed).throw()
    path = tmp_path / "random.safetensors"
    save_file({name: t.contiguous().clone() for name, t in made.tensors.items()}, path)
    if made.fault:
        before = sample(twins.quantized, steps=1)
        with pytest.raises(ValueError, match=r"^random\.safetensors: "):
            apply_lora(twins.quantized, path, made.strength)
        assert torch.equal(sample(twins.quantized, steps=1), before)
        return
    state = twins.dense.model.diffusion_model.state_dict()
    wanted = made.differences(lambda host: state[f"{host}.weight"].double().numpy())
    whole = {f"diffusion_model.{host}.diff": torch.from_numpy(d).float() for host, d in wanted.items()}
    ours = sample(apply_lora(twins.quantized, path, made.strength)[0], steps=1)
    assert_close(ours, sample(loras.stock(twins.dense, whole), steps=1), "host_dense_branch")


@pytest.mark.parametrize("seed", range(5000, 5040))
def test_baked(quantized, weights, tmp_path, seed):
    """The same in a new file: the branch, and beside it what has none, add what the definition says; or a refusal."""
    made = Dice(seed).throw()
    path = tmp_path / "random.safetensors"
    save_file({name: t.contiguous().clone() for name, t in made.tensors.items()}, path)
    arguments = DEMO_INT4, [(path, made.strength)], tmp_path / "baked.safetensors"
    if made.fault:
        with pytest.raises(ValueError, match=r"^random\.safetensors: "):
            bake(*arguments, limit=1e-4)
        assert list(tmp_path.iterdir()) == [path]
        return
    baked = bake(*arguments, limit=1e-4)
    wider = Base(open_checkpoint(baked.target))
    beside = load_file(baked.rest) if baked.rest else {}
    for host, difference in made.differences(weights.__getitem__).items():
        got = wider.weight(host).double().numpy() - weights[host]
        rest = [beside.get(f"diffusion_model.{host}.lora_{end}.weight") for end in ("up", "down")]
        got = got if rest[0] is None else got + (rest[0].double() @ rest[1].double()).numpy()
        assert_close(got, difference, "two_bf16_factors")
