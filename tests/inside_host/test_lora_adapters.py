"""Adapters other than a plain pair, through the stock loader, against the host's merge on the dense twin."""

from __future__ import annotations

import comfy.sd
import comfy.weight_adapter
import pytest
import torch

from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import error, sample
from svdquant_nodes.tests.tolerances import assert_close

H = loras.HIDDEN
QKV = "lora_unet_double_blocks_0_img_attn_qkv", 3 * H, H
OUT = "lora_unet_single_blocks_0_linear2", H, 5 * H
TO_K = "transformer.single_transformer_blocks.1.attn.to_k", H, H


def random(*shape, seed, by=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * by


def members(name, tensors):
    return {f"{name}.{tail}": t for tail, t in tensors.items()}


def loha(place, rank):
    name, n, k = place
    halves = {f"hada_w{i}_a": random(n, rank, seed=i, by=0.5) for i in (1, 2)}
    halves |= {f"hada_w{i}_b": random(rank, k, seed=i + 2, by=0.2) for i in (1, 2)}
    return members(name, halves | {"alpha": torch.tensor(float(rank))})


def lokr(place, factor, thin):
    name, n, k = place
    tensors = {"lokr_w1": random(factor, factor, seed=1, by=0.3)}
    n, k = n // factor, k // factor
    if thin:
        tensors |= {"lokr_w2_a": random(n, thin, seed=2), "lokr_w2_b": random(thin, k, seed=3, by=0.1)}
    else:
        tensors["lokr_w2"] = random(n, k, seed=2, by=0.1)
    return members(name, tensors)


def lokr_in_four(place, factor=8, rank=2):
    name, n, k = place
    sizes = {"w1_a": (factor, rank), "w1_b": (rank, factor)}
    sizes |= {"w2_a": (n // factor, rank), "w2_b": (rank, k // factor)}
    tensors = {f"lokr_{t}": random(*s, seed=i, by=0.3) for i, (t, s) in enumerate(sizes.items())}
    return members(name, tensors | {"alpha": torch.tensor(3.0)})


def tucker_loha(place, rank=3):
    name, n, k = place
    tensors = {f"hada_w{i}_a": random(rank, n, seed=i, by=0.5) for i in (1, 2)}
    tensors |= {f"hada_w{i}_b": random(rank, k, seed=i + 2, by=0.2) for i in (1, 2)}
    tensors |= {f"hada_t{i}": random(rank, rank, 1, 1, seed=i + 4) for i in (1, 2)}
    return members(name, tensors | {"alpha": torch.tensor(2.0)})


def glora(place, rank=4, old=False):
    name, n, k = place
    sizes = {"a1": (k, rank), "a2": (rank, k), "b1": (n, rank), "b2": (rank, k)}
    if old:
        sizes = {"a1": sizes["a2"], "a2": sizes["a1"], "b1": sizes["b2"], "b2": sizes["b1"]}
    return members(
        name, {f"{t}.weight": random(*s, seed=i, by=0.15) for i, (t, s) in enumerate(sizes.items())}
    )


def oft(place, size=16, axes=3, **more):
    name, n, _ = place
    blocks = random(*(2,) * (axes - 3), n // size, size, size, seed=5, by=0.1)
    return members(name, {"oft_blocks": blocks} | more)


def diff(place, rank):
    name, n, k = place
    return {f"{name}.diff": random(n, rank, seed=6, by=0.3) @ random(rank, k, seed=7, by=0.1)}


def mid(place, rank=4):
    name, n, k = place
    tensors = {
        "lora_up.weight": random(n, rank, 1, 1, seed=1),
        "lora_down.weight": random(rank, k, 1, 1, seed=2, by=0.1),
    }
    return members(name, tensors | {"lora_mid.weight": random(rank, rank, 1, 1, seed=3)})


def dora(tensors, place, by_columns=False):
    name, n, k = place
    return tensors | {f"{name}.dora_scale": random(*((1, k) if by_columns else (n, 1)), seed=9, by=3).abs()}


RESCALE = 1 + random(QKV[1], 1, seed=3, by=0.1)
EXACT = {
    "locon-tucker": mid(OUT),
    "loha-tucker": tucker_loha(OUT),
    "lokr-in-four": lokr_in_four(OUT),
    "glora-old": glora(QKV, old=True),
    "glora-old-square": glora(TO_K, old=True),
    "loha": loha(QKV, 2) | loha(OUT, 3),
    "loha-slice": loha(TO_K, 2),
    "lokr-thin": lokr(QKV, 4, 3) | lokr(OUT, 16, 2),
    "lokr-whole": lokr(QKV, 8, 0) | lokr(OUT, 4, 0),
    "lokr-of-many-blocks": lokr(OUT, 32, 0),
    "lokr-slice": lokr(TO_K, 4, 0),
    "glora": glora(QKV) | glora(OUT),
    "glora-slice": glora(TO_K),
}
WHOLE = {  # a dense difference in the host's 16-bit LoRA dtype
    "oft": oft(QKV) | oft(OUT),
    "oft-constrained": oft(QKV, alpha=torch.tensor(0.5)),
    "oft-rescaled": oft(QKV, alpha=torch.tensor(0.0), rescale=RESCALE),
    "boft": oft(QKV, axes=4, alpha=torch.tensor(0.0)),
    "boft-rescaled": oft(QKV, axes=4, alpha=torch.tensor(0.0), rescale=RESCALE),
    "dora-of-loha": dora(loha(QKV, 2), QKV),
    "dora-of-lokr-by-columns": dora(lokr(OUT, 4, 2), OUT, by_columns=True),
    "dora-of-glora": dora(glora(QKV), QKV),
    "dora-of-oft": dora(oft(QKV, alpha=torch.tensor(0.5)), QKV),
    "dora-of-a-tucker-form": dora(mid(OUT), OUT),
    "difference": diff(QKV, 200),
    "loha-of-high-rank": loha(QKV, 12),
}


def compare(twins, tensors, tolerance, strength=0.7):
    quantized, dense = (loras.stock(m, tensors, strength) for m in (twins.quantized, twins.dense))
    expected = sample(dense)
    assert error(expected, sample(twins.dense)) > 0.002
    assert_close(sample(quantized), expected, tolerance)
    return quantized


def branches(model, name):
    return next(layer.branches for key, layer in quantized_linears(model.model) if name in key)


@pytest.mark.parametrize("tensors", EXACT.values(), ids=EXACT)
def test_joins_exactly_without_a_dense_difference(twins, tensors):
    model = compare(twins, tensors, "host_twin")
    for key, layer in quantized_linears(model.model):
        assert all(b.up is not None or b.kron is not None for b in layer.branches), key


@pytest.mark.parametrize("tensors", WHOLE.values(), ids=WHOLE)
def test_what_is_not_low_rank_joins_whole(twins, tensors):
    compare(twins, tensors, "host_dense_branch")


def test_a_difference_of_low_rank_is_found_to_be_one(twins):
    model = compare(twins, diff(QKV, 20), "host_dense_branch")
    [branch] = branches(model, "img_attn.qkv")
    assert branch.down.shape[0] == 20


def test_the_limit_is_a_setting(twins, monkeypatch):
    noisy = diff(QKV, 8)
    noisy = {n: t + random(*t.shape, seed=8, by=t.norm() / t.numel() ** 0.5 * 0.01) for n, t in noisy.items()}
    whole = compare(twins, noisy, "host_dense_branch")
    assert branches(whole, "img_attn.qkv")[0].up is None
    monkeypatch.setenv("SVDQUANT_LORA_ERROR", "0.02")
    model = loras.stock(twins.quantized, noisy)
    sample(model, steps=1)
    [branch] = branches(model, "img_attn.qkv")
    [delta] = noisy.values()
    assert branch.down.shape[0] == 8
    assert 0.005 < error(branch.up @ branch.down, delta) <= 0.02


@pytest.mark.parametrize(
    "second", [loras.dora, lambda: oft(QKV), lambda: glora(QKV)], ids=["dora", "oft", "glora"]
)
def test_order_is_kept_where_it_matters(twins, second):
    """A patch that looks at the weight sees what came before it, and not what came after."""

    def stack(model):
        return loras.stock(
            loras.stock(loras.stock(model, loras.kohya(), 0.5), second(), 0.8), loras.kohya(6), 0.4
        )

    assert_close(sample(stack(twins.quantized)), sample(stack(twins.dense)), "host_dense_branch")


def test_every_adapter_of_the_host_is_here(twins):
    patched = [loras.stock(twins.dense, tensors).patches for tensors in (EXACT | WHOLE).values()]
    found = {patch[1].name for one in patched for [patch] in one.values() if hasattr(patch[1], "name")}
    assert found == {adapter.name for adapter in comfy.weight_adapter.adapters}


def test_tucker_lokr(twins):
    """The host fails to lay out this product and leaves the layer as it is; the definition is plain, so we take it."""
    (name, n, k), rank = QKV, 3
    up, down, core = random(rank, n // 4, seed=2), random(rank, k // 4, seed=3, by=0.1), random(3, 3, seed=4)
    first = {"lokr_w1": random(4, 4, seed=1, by=0.3), "alpha": torch.tensor(2.0)}
    tucker = first | {"lokr_w2_a": up, "lokr_w2_b": down, "lokr_t2": core.reshape(rank, rank, 1, 1)}
    same = first | {"lokr_w2_a": up.T.contiguous(), "lokr_w2_b": core @ down}
    joined = loras.stock(twins.quantized, members(name, tucker))
    assert_close(sample(joined), sample(loras.stock(twins.dense, members(name, same))), "host_twin")


def test_what_the_host_cannot_read_adds_nothing(twins, caplog):
    """It takes no BOFT without the number that bounds it, says so in the log, and goes on."""
    model = loras.stock(twins.quantized, oft(QKV, axes=4))
    assert torch.equal(sample(model), sample(twins.quantized))
    assert "ERROR boft" in caplog.text
    sample(model, steps=1)
    assert branches(model, "img_attn.qkv") == ()


def test_a_patch_that_does_not_fit_is_skipped_and_said(twins, caplog):
    name, n, k = QKV
    wrong = {
        f"{name}.lora_up.weight": random(n + 1, 4, seed=1),
        f"{name}.lora_down.weight": random(4, k, seed=2),
    }
    with caplog.at_level("WARNING"):
        skipped = sample(loras.stock(twins.quantized, {**wrong, **lokr(OUT, 4, 2)}))
    assert (
        "LoRA: skipped on 1 layers, which it does not fit, such as diffusion_model.double_blocks.0.img_attn.qkv"
        in (caplog.text)
    )
    assert_close(skipped, sample(loras.stock(twins.dense, lokr(OUT, 4, 2))), "host_twin")


class TestBypass:
    """The host's loader that wraps forwards."""

    @staticmethod
    def load(model, tensors, strength):
        return comfy.sd.load_bypass_lora_for_models(model, None, dict(tensors), strength, 0)[0]

    def test_two_in_a_row_both_act(self, twins):
        ours = self.load(self.load(twins.quantized, loras.kohya(), 0.6), loras.comfy_names(), -0.5)
        theirs = loras.stock(loras.stock(twins.dense, loras.kohya(), 0.6), loras.comfy_names(), -0.5)
        assert_close(sample(ours), sample(theirs), "host_twin")

    def test_on_quantized_and_plain_layers(self, twins):
        before = sample(twins.quantized)
        both = loras.kohya() | loras.plain_layer()
        ours = self.load(self.load(twins.quantized, both, 0.6), loras.plain_layer(11), 0.5)
        theirs = loras.stock(loras.stock(twins.dense, both, 0.6), loras.plain_layer(11), 0.5)
        assert_close(sample(ours), sample(theirs), "host_dense_branch")  # bf16 LoRA beside bf16 layers
        assert torch.equal(sample(twins.quantized), before)
        layer = twins.quantized.model.diffusion_model.img_in
        assert layer.forward.__self__ is layer

    def test_stacks_with_the_ordinary_loader(self, twins):
        ours = loras.stock(self.load(twins.quantized, loras.kohya(), 0.6), loras.diffusers(), 0.4)
        theirs = loras.stock(loras.stock(twins.dense, loras.kohya(), 0.6), loras.diffusers(), 0.4)
        assert_close(sample(ours), sample(theirs), "host_twin")

    def test_dropped_slices_are_said(self, quantized, caplog):
        with caplog.at_level("WARNING"):
            self.load(quantized, loras.diffusers(), 1.0)
        assert "drops the q, k and v parts of LoRAs in diffusers naming" in caplog.text
