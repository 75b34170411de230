"""Partial loading: layers left in RAM and layers moved back compute the same, with and without a LoRA."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import pytest
import torch

from svdquant_nodes.svdquant.adapters import layout
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.core import linear
from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import sample
from svdquant_nodes.tests.tolerances import assert_close

CPU = torch.device("cpu")


@pytest.fixture
def as_loaded(monkeypatch):
    """Let the sampler take the model as the test left it, instead of loading it whole."""
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)


def load_part_of(model, most: bool) -> None:
    """Load a few layers, or all but a few, and leave the rest in RAM.

    The host keeps room for one dense layer beside what it loads, which in this tiny model is more than everything;
    so the budget that does it has to be searched.
    """
    size = model.model_size()
    budgets = range(size, 12 * size, size // 16)
    for budget in reversed(budgets) if most else budgets:
        model.load(CPU, lowvram_model_memory=budget)
        if model.model.model_lowvram and model.loaded_size() > 0:
            return
        model.unpatch_model(CPU)


@pytest.mark.parametrize("most", [False, True], ids=["few-layers", "most-layers"])
def test_partial_load_then_unload(twins, as_loaded, most):
    model, dense = (loras.stock(m, loras.kohya()) for m in (twins.quantized, twins.dense))
    load_part_of(model, most)
    assert model.model.model_lowvram
    assert 0 < model.loaded_size() < model.model_size()
    dense.partially_load(CPU, 10**12)
    expected = sample(dense)
    assert_close(sample(model), expected, "host_twin")
    assert model.partially_unload(CPU, model.model_size() // 10) > 0
    assert_close(sample(model), expected, "host_twin")
    model.detach()
    dense.detach()


def test_model_size_counts_everything_once(quantized):
    packed = sum(layer.weight.nbytes for _, layer in quantized_linears(quantized.model))
    plain = sum(
        t.nbytes for name, t in quantized.model.state_dict().items() if type(t).__name__ != "QuantizedTensor"
    )
    assert quantized.model_size() == packed + plain


def test_unloading_drops_the_branches(twins):
    model = loras.stock(twins.quantized, loras.kohya())
    sample(model)
    assert any(layer.branches for _, layer in quantized_linears(model.model))
    model.detach()
    assert not any(layer.branches for _, layer in quantized_linears(model.model))


def test_a_dying_clone_leaves_the_loaded_one_alone(twins):
    model = loras.stock(twins.quantized, loras.kohya())
    with_lora = sample(model)
    before = {key: layer.branches for key, layer in quantized_linears(model.model)}
    loras.stock(twins.quantized, loras.diffusers())  # freed at once: the host detaches it
    assert {key: layer.branches for key, layer in quantized_linears(model.model)} == before
    assert torch.equal(sample(model), with_lora)


def test_patcher_is_freed_by_reference_count(quantized):
    import gc
    import weakref

    gc.disable()
    try:
        clone = quantized.clone()
        seen = weakref.ref(clone)
        del clone
        assert seen() is None, "something of ours keeps a cycle through the patcher"
    finally:
        gc.enable()


def test_non_dynamic_delegate_can_be_rebuilt(quantized):
    build, arguments, *_ = quantized.cached_patcher_init
    rebuilt = build(*arguments, disable_dynamic=True)
    assert type(rebuilt) is comfy.model_patcher.ModelPatcher
    assert torch.equal(sample(rebuilt), sample(quantized))


def test_a_layer_streams_through_the_hosts_gathered_buffer(quantized):
    """How pinning, async offload and dynamic VRAM move a layer: weight and bias into one flat buffer, and back."""
    from comfy.memory_management import interpret_gathered_like, vram_aligned_size
    from comfy.model_management import cast_to_gathered

    for key, layer in quantized_linears(quantized.model):
        tensors = [layer.weight, layer.bias]
        buffer = torch.full((vram_aligned_size(tensors),), 0xAB, dtype=torch.uint8)
        cast_to_gathered(tensors, buffer)
        weight, bias = interpret_gathered_like(tensors, buffer)
        assert torch.equal(weight._qdata, layer.weight._qdata), key
        assert torch.equal(bias, layer.bias)
        parts = layout.unpack(weight._qdata, weight._params)
        x = torch.randn(3, layer.in_features)
        assert torch.equal(linear.forward(x, parts, bias, (), layer.op_set), layer(x)), key
