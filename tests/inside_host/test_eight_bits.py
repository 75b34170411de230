"""A 4-bit checkpoint run in 8 bits: closer to the 16-bit model, twice the bytes, and a host model like any other."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import pytest
import torch

from svdquant_nodes.svdquant.adapters import layout
from svdquant_nodes.svdquant.adapters.activations import CHOICES
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.inside_host import loras, twins
from svdquant_nodes.tests.inside_host.test_memory import as_loaded, load_part_of  # noqa: F401
from svdquant_nodes.tests.inside_host.twins import DEMO_BF16, DEMO_INT4, error, sample
from svdquant_nodes.tests.tolerances import assert_close


@pytest.fixture(scope="module")
def wide():
    """The demo model in 8 bits, as users load it."""
    with torch.inference_mode():
        return load_model(DEMO_INT4, activations="8 bit")


@pytest.fixture(scope="module")
def wide_twins():
    """The same with exact activations, and its dense twin."""
    with torch.inference_mode():
        return twins.make(activations="8 bit")


def parts_of(model):
    for key, layer in quantized_linears(model.model):
        for part in layout.unpack(layer.weight._qdata, layer.weight._params):
            yield key, part


def test_only_four_bit_parts_are_widened(quantized, wide):
    before = {key: part.weights.spec.format for key, part in parts_of(quantized)}
    after = {key: part.weights.spec.format for key, part in parts_of(wide)}
    assert set(before.values()) == {"int4", "awq"}
    assert after == {key: "awq" if name == "awq" else "int8" for key, name in before.items()}


def test_shapes_and_shifts_are_kept(quantized, wide):
    for (key, four), (_, eight) in zip(parts_of(quantized), parts_of(wide), strict=True):
        assert (eight.rows, eight.columns) == (four.rows, four.columns), key
        assert eight.weights.spec.act_shift == four.weights.spec.act_shift, key
        assert eight.weights.rank == four.weights.rank, key


def test_closer_to_the_16_bit_model(quantized, wide):
    truth = sample(comfy.sd.load_diffusion_model(str(DEMO_BF16)))
    assert error(sample(wide), truth) < 0.8 * error(sample(quantized), truth)


def test_every_layer_is_closer_to_exact_activations(quantized, wide, twins):
    """Layer by layer, on tokens of its own width."""
    exact = dict(quantized_linears(twins.quantized.model))
    eights = dict(quantized_linears(wide.model))
    for key, layer in quantized_linears(quantized.model):
        if layout.unpack(layer.weight._qdata, layer.weight._params)[0].weights.spec.format != "awq":
            x = layers.random(9, layer.in_features, seed=4, dtype=torch.bfloat16)
            truth = exact[key](x.float())
            assert error(eights[key](x), truth) < error(layer(x), truth) / 3, key


def test_bytes_are_those_of_eight_bits(quantized, wide):
    """What the host measures and moves is the 8-bit model: twice the codes, a scale a row, nothing else."""

    def packed(model):
        return sum(
            part.weights.codes.nbytes for _, part in parts_of(model) if part.weights.smooth is not None
        )

    assert packed(wide) == 2 * packed(quantized)
    assert wide.model_size() - quantized.model_size() < packed(quantized)
    held = sum(layer.weight.nbytes for _, layer in quantized_linears(wide.model))
    plain = sum(t.nbytes for t in wide.model.state_dict().values() if type(t).__name__ != "QuantizedTensor")
    assert wide.model_size() == held + plain


# ---- a host model like any other ----


def test_equals_its_dense_twin(wide_twins):
    assert_close(sample(wide_twins.quantized), sample(wide_twins.dense), "host_twin")


@pytest.mark.parametrize("make", [loras.kohya, loras.diffusers, loras.loha], ids=lambda make: make.__name__)
def test_a_lora_means_the_same(wide_twins, make):
    model, dense = (loras.stock(m, make()) for m in (wide_twins.quantized, wide_twins.dense))
    assert_close(sample(model), sample(dense), "host_twin")


def test_a_lora_that_looks_at_the_weight_means_the_same(wide_twins):
    model, dense = (loras.stock(m, loras.dora()) for m in (wide_twins.quantized, wide_twins.dense))
    assert_close(sample(model), sample(dense), "host_dense_branch")


@pytest.mark.parametrize("most", [False, True], ids=["few-layers", "most-layers"])
def test_partly_loaded(wide_twins, as_loaded, most):  # noqa: F811
    model, dense = (loras.stock(m, loras.kohya()) for m in (wide_twins.quantized, wide_twins.dense))
    load_part_of(model, most)
    assert 0 < model.loaded_size() < model.model_size()
    dense.partially_load(torch.device("cpu"), 10**12)
    assert_close(sample(model), sample(dense), "host_twin")
    model.detach()
    dense.detach()


def test_dense_weight_and_bias_for_merging_nodes(wide):
    for key, layer in quantized_linears(wide.model):
        parts = layout.unpack(layer.weight._qdata, layer.weight._params)
        weight, bias = layout.dense(parts, tuple(layer.weight.shape), layer.bias)
        assert torch.equal(layer.convert_weight(layer.weight), weight.to(layer.weight.dtype)), key
        if any(part.weights.spec.act_shift for part in parts):
            (part,) = (part for part in parts if part.weights.spec.act_shift)
            taken = reference.residual(part.weights).sum(-1) * part.weights.spec.act_shift
            assert_close(bias - layer.bias.float(), taken, "fp32_sum")


def test_rebuilt_for_a_delegate_in_the_same_width(wide):
    build, arguments, *_ = wide.cached_patcher_init
    assert torch.equal(sample(build(*arguments, disable_dynamic=True)), sample(wide))


# ---- what users choose ----


def test_auto_is_four_bits_on_a_cpu(quantized):
    four = load_model(DEMO_INT4, activations="4 bit")
    for (key, a), (_, b) in zip(
        quantized_linears(quantized.model), quantized_linears(four.model), strict=True
    ):
        assert torch.equal(a.weight._qdata, b.weight._qdata), key


def test_log_says_the_width(caplog):
    with caplog.at_level("INFO"):
        load_model(DEMO_INT4, activations="8 bit")
    assert "8-bit activations" in caplog.text


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=f"activations: expected one of {', '.join(CHOICES)}, got '8-bit'"):
        load_model(DEMO_INT4, activations="8-bit")
