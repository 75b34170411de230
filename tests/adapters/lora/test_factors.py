"""Adapters as branches, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.adapters.lora import factors, truncation
from svdquant_nodes.tests import layers, lora_oracle
from svdquant_nodes.tests.tolerances import assert_close

N, K = 96, 64


def random(*shape, seed, dtype=torch.float32):
    return layers.random(*shape, seed=seed, dtype=dtype)


def lora(rank=4, dtype=torch.float32, **more):
    return {
        "lora_up.weight": random(N, rank, seed=1, dtype=dtype),
        "lora_down.weight": random(rank, K, seed=2, dtype=dtype),
        **more,
    }


def loha(rank=2, **more):
    halves = {f"hada_w{i}_a": random(N, rank, seed=i) for i in (1, 2)}
    return halves | {f"hada_w{i}_b": random(rank, K, seed=i + 2) for i in (1, 2)} | more


def lokr(form, a=3, b=2, **more):
    """W1 [a, b], W2 [N/a, K/b], each whole or thin as `form` says: "ww", "tw", "wt", "tt"."""
    members = {}
    for i, (kind, n, k) in enumerate(zip(form, (a, N // a), (b, K // b), strict=True), 1):
        if kind == "w":
            members[f"lokr_w{i}"] = random(n, k, seed=10 * i)
        else:
            members |= {f"lokr_w{i}_a": random(n, 2, seed=10 * i), f"lokr_w{i}_b": random(2, k, seed=11 * i)}
    return members | more


def dense(found):
    """The branches as one matrix, in float64."""
    total = torch.zeros(N, K, dtype=torch.float64)
    for b in found.branches:
        whole = b.down.double() if b.up is None else b.up.double() @ b.down.double()
        whole = whole if b.kron is None else torch.kron(b.kron.double(), whole)
        total[b.rows, b.columns] += b.strength * whole
    return total


ALPHA = {"alpha": torch.tensor(3.0)}
CASES = {
    "lora": lora(),
    "lora-alpha": lora(**ALPHA),
    "lora-bf16": lora(dtype=torch.bfloat16, **ALPHA),
    "locon-mid": lora(**{"lora_mid.weight": random(4, 4, 1, 1, seed=3)}, **ALPHA),
    "loha": loha(),
    "loha-alpha": loha(**ALPHA),
    "lokr-whole-whole": lokr("ww"),
    "lokr-whole-ignores-alpha": lokr("ww", **ALPHA),
    "lokr-thin-whole": lokr("tw", **ALPHA),
    "lokr-whole-thin": lokr("wt", **ALPHA),
    "lokr-thin-thin": lokr("tt", **ALPHA),
    "lokr-of-one": lokr("wt", a=1, b=1),
}


@pytest.mark.parametrize("members", CASES.values(), ids=CASES)
def test_exact(members):
    found = factors.factor(members)
    assert found.error == 0
    assert_close(dense(found), lora_oracle.low_rank(members), "fp32_sum")


@pytest.mark.parametrize("members", CASES.values(), ids=CASES)
def test_size_is_told_beforehand(members):
    assert factors.size(members) == (N, K)


def as_convolution(members):
    """The same with the factors that read the input as 1x1 kernels, as LyCORIS saves them for convolutions."""
    reads = ("lora_down.weight", "hada_w1_b", "hada_w2_b", "lokr_w2_b", "lokr_w2")
    return {tail: t[..., None, None] if tail in reads else t for tail, t in members.items()}


@pytest.mark.parametrize("members", CASES.values(), ids=CASES)
def test_kernels_of_one_are_matrices(members):
    kernels = as_convolution(members)
    assert factors.size(kernels) == (N, K)
    assert_close(dense(factors.factor(kernels)), lora_oracle.low_rank(members), "fp32_sum")


@pytest.mark.parametrize("members", CASES.values(), ids=CASES)
def test_bytes_are_told_beforehand(members):
    """At least those of the branches, so that a plan of what fits into VRAM is kept; LoHa's to the byte."""
    found, planned = factors.factor(members).nbytes, factors.planned(members)
    assert found <= planned <= 3 * found
    assert planned == found or "hada_w1_a" not in members


def test_bytes_of_what_has_no_factors_are_unknown():
    assert factors.planned(loha(rank=8)) is None
    assert factors.planned({"diff": random(N, K, seed=1)}) is None


@pytest.mark.parametrize(
    "members", [{"oft_blocks": torch.zeros(2, 4, 4)}, {"diff_b": torch.zeros(4)}, {}], ids=str
)
def test_size_that_the_tensors_do_not_say(members):
    assert factors.size(members) is None


class TestGLoRA:
    """W + B1 B2 + W A1 A2, in the order of factors that files have now and in the older one."""

    def members(self, n, k, rank, *, old):
        a1, a2, b1, b2 = (
            random(*s, seed=i) for i, s in enumerate(((k, rank), (rank, k), (n, rank), (rank, k)))
        )
        a1, a2, b1, b2 = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
        return {
            f"{name}.weight": t for name, t in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
        }

    @pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
    @pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)], ids=str)
    def test_both_orders(self, shape, old):
        weight = random(*shape, seed=9)
        found = factors.glora(self.members(*shape, 4, old=old) | ALPHA, weight)
        want = lora_oracle.difference(
            self.members(*shape, 4, old=False) | ALPHA, weight.double().numpy(), 1.0
        )
        assert_close(found.difference(), want, "fp32_sum")

    def test_where_shapes_do_not_tell_the_older_order_is_meant(self):
        """As in ComfyUI: all four are square, so both orders fit."""
        weight = random(8, 8, seed=9)
        members = self.members(8, 8, 8, old=True)
        want = lora_oracle.difference(self.members(8, 8, 8, old=False), weight.double().numpy(), 1.0)
        assert_close(factors.glora(members, weight).difference(), want, "fp32_sum")

    def test_factors_of_another_layer_do_not_fit(self):
        members = self.members(24, 16, 4, old=False)
        assert factors.glora_factors(members, (24, 16)) is not None
        assert factors.glora_factors(members, (16, 24)) is None
        assert factors.glora_factors(members | {"b2.weight": random(5, 16, seed=1)}, (24, 16)) is None
        assert factors.glora_factors(lora(), (N, K)) is None


def test_a_plain_pair_is_not_copied():
    members = lora()
    [branch] = factors.factor(members).branches
    assert branch.down.data_ptr() == members["lora_down.weight"].data_ptr()
    assert branch.up.data_ptr() == members["lora_up.weight"].data_ptr()


def test_ranks():
    assert factors.factor(lora()).rank == 4
    assert factors.factor(loha(rank=3)).rank == 9
    assert factors.factor(lokr("ww")).rank == 0  # a product of its own kind


@pytest.mark.parametrize("form", ["ww", "wt", "tw", "tt"])
def test_a_kronecker_product_stays_two_small_matrices(form):
    members = lokr(form, a=8, b=4)
    [branch] = factors.factor(members).branches
    assert branch.kron.shape == (8, 4)
    assert sum(t.numel() for t in branch.tensors) <= 8 * 4 + (N // 8) * (K // 4)
    if form == "ww":
        assert branch.down.data_ptr() == members["lokr_w2"].data_ptr()


def test_what_costs_more_than_the_weight_has_no_factors():
    assert factors.factor(loha(rank=8)) is None


def test_a_tucker_core_of_a_convolution_costs_no_rank():
    core = random(4, 4, 3, 3, seed=3)
    [branch] = factors.factor(lora(**{"lora_mid.weight": core})).branches
    up, down = (lora()[f"lora_{end}.weight"].double() for end in ("up", "down"))
    expected = torch.einsum("ni,ijhw,jk->nkhw", up, core.double(), down).flatten(1)
    assert branch.rank == 4
    assert_close(branch.difference(), expected, "fp32_sum")


BROKEN = {
    "lora": lora() | {"lora_down.weight": random(5, K, seed=1)},
    "mid": lora() | {"lora_mid.weight": random(4, 5, 1, 1, seed=1)},
    "loha-half": loha() | {"hada_w1_b": random(3, K, seed=1)},
    "loha-halves": loha() | {"hada_w1_a": random(N + 1, 2, seed=1)},
    "lokr": lokr("tt") | {"lokr_w1_b": random(3, 2, seed=1)},
}


@pytest.mark.parametrize("members", BROKEN.values(), ids=BROKEN)
def test_factors_that_do_not_fit_each_other(members):
    with pytest.raises(ValueError, match="expected them to share their inner size"):
        factors.size(members)


def spectrum(values, n=256, k=192):
    """A matrix with these singular values."""
    u, v = (torch.linalg.qr(layers.random(size, len(values), seed=size)).Q for size in (n, k))
    return (u * torch.tensor(values)) @ v.T


class TestTruncated:
    """256 x 192: fp32 factors pay up to rank 54."""

    def test_keeps_the_fewest_ranks_within_the_limit(self):
        # 10 values of 1 and 90 of 1e-3: what is left after all ten is sqrt(90) * 1e-3 / sqrt(10) = 3.0e-3
        delta = spectrum([1.0] * 10 + [1e-3] * 90)
        found = truncation.truncated(delta, 4e-3)
        assert found.rank == 10
        assert found.error == pytest.approx(3.0e-3, rel=0.05)
        [branch] = found.branches
        assert_close(
            (delta - branch.up @ branch.down).norm() / delta.norm(), torch.tensor(found.error), "fp32_sum"
        )

    def test_exactly_low_rank(self):
        found = truncation.truncated(spectrum([3.0, 2.0, 1.0]), 1e-3)
        assert found.rank == 3
        assert found.error < 1e-5

    def test_gives_up_on_full_rank(self):
        assert truncation.truncated(layers.random(256, 192, seed=1), 1e-3) is None

    def test_gives_up_where_it_would_not_pay(self):
        assert truncation.truncated(spectrum([1.0] * 60), 1e-3) is None

    def test_is_the_same_every_time(self):
        delta = spectrum([1.0, 0.5, 0.1])
        first, second = (truncation.truncated(delta, 1e-3).branches[0] for _ in range(2))
        assert torch.equal(first.down, second.down) and torch.equal(first.up, second.up)

    @pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
    def test_what_it_would_have_taken(self, turned):
        # 16 + 9 + 4 + 1 = 30: two ranks leave sqrt(5/30) = 0.41, three sqrt(1/30) = 0.18, of the whole
        delta = spectrum([4.0, 3.0, 2.0, 1.0])
        rank, left = truncation.needed(delta.T if turned else delta, 0.3, 2)
        assert rank == 3 and left == pytest.approx((5 / 30) ** 0.5, rel=1e-3)

    def test_nothing_needs_no_branch(self):
        assert truncation.truncated(torch.zeros(8, 8), 1e-3).branches == ()
