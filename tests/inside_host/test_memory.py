"""Partial loading: layers left in RAM and layers moved back compute the same, with and without a LoRA."""

from __future__ import annotations

import copy
import dataclasses
import weakref

import comfy.model_management
import comfy.model_patcher
import pytest
import torch

from svdquant_nodes.svdquant.adapters import layout
from svdquant_nodes.svdquant.adapters.lora import budget, residence
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
    for memory in reversed(budgets) if most else budgets:
        model.load(CPU, lowvram_model_memory=memory)
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


@pytest.mark.parametrize("most", [False, True], ids=["few-layers", "most-layers"])
def test_a_merge_of_streamed_layers(twins, as_loaded, most):
    """The host merges their biases step by step, and those of unsigned layers are not the dense layer's."""
    merged = twins.quantized.clone()
    merged.add_patches(twins.dense.get_key_patches("diffusion_model."), 0.5, 0.5)
    twins.dense.partially_load(CPU, 10**12)
    expected = sample(twins.dense)
    load_part_of(merged, most)
    assert merged.model.model_lowvram
    assert_close(sample(merged), expected, "host_dense_branch")
    assert merged.partially_unload(CPU, merged.model_size() // 10) > 0
    assert_close(sample(merged), expected, "host_dense_branch")
    merged.detach()
    twins.dense.detach()


def test_dynamic_vram_is_given_a_merge_of_the_dense_bias(twins):
    """It calls the host's own object, of which it asks more than a call."""
    layer = twins.quantized.model.diffusion_model.double_blocks[0].img_mlp[2]
    halved = (0.5, ("diff", (torch.zeros_like(layer.bias),)), 0.5, None, None)
    patch = comfy.model_patcher.LowVramPatch("bias", {"bias": [halved]})
    patch._pin_state = object()  # set before the layer has it
    layer.bias_lowvram_function = patch
    try:
        given = layer.bias_lowvram_function
        more = layer.compensation(layer.bias.float())
        assert torch.equal(given(layer.bias), (0.5 * (layer.bias + more) - more).to(layer.bias.dtype))
        assert given.patches is patch.patches and given._pin_state is patch._pin_state
        assert given is layer.bias_lowvram_function and copy.copy(given).patches is patch.patches
    finally:
        layer.bias_lowvram_function = None
    assert layer.bias_lowvram_function is None


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


def test_code_that_holds_a_weight_itself_computes_as_the_layer_does(quantized):
    for key, layer in quantized_linears(quantized.model):
        x = torch.randn(3, layer.in_features)
        assert torch.equal(torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x)), key


class TestPartsAreMadeOnce:
    """Views, checks and the bias of a layer are put together once for as long as its buffer lives."""

    @pytest.fixture(params=["one-part", "two-parts"])
    def layer(self, quantized, request):
        found = [layer for _, layer in quantized_linears(quantized.model) if layer.bias is not None]
        return next(l for l in found if (len(l.weight._params.entries) > 1) == (request.param == "two-parts"))

    def test_and_are_those_that_are_made_anew(self, layer):
        made, weight = layout.parts_of(layer.weight, layer.bias), layer.weight
        assert layout.parts_of(weight, layer.bias) is made
        fresh = linear.with_bias(layout.unpack(weight._qdata, weight._params), layer.bias)
        for one, other in zip(made, fresh, strict=True):
            assert (one.row, one.column, one.weights.spec) == (other.row, other.column, other.weights.spec)
            ours, theirs = one.weights.tensors(), other.weights.tensors()
            assert list(ours) == list(theirs)
            assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x), linear.forward(x, fresh, None, (), layer.op_set))

    def test_another_bias_is_not_the_old_one(self, layer):
        x = torch.randn(3, layer.in_features)
        before, old = layer(x), layer.bias
        try:
            layer.bias = torch.nn.Parameter(old + 1, requires_grad=False)
            after = layer(x)
            fresh = layout.unpack(layer.weight._qdata, layer.weight._params)
            assert torch.equal(after, linear.forward(x, fresh, layer.bias, (), layer.op_set))
        finally:
            layer.bias = old
        assert not torch.equal(after, before)
        assert torch.equal(layer(x), before)

    def test_a_bias_that_is_changed_in_place_is_seen(self, layer):
        bias = layer.bias.clone()
        made = layout.parts_of(layer.weight, bias)
        bias += 1
        assert layout.parts_of(layer.weight, bias) is made
        assert torch.equal(torch.cat([p.weights.bias for p in made if p.weights.bias is not None]), bias)

    def test_and_go_with_the_buffer(self, layer):
        """A streamed layer's buffer is one step's own: nothing of it may stay."""
        weight = layer.weight.clone()
        seen = [weakref.ref(weight._qdata)]
        made = layout.parts_of(weight, layer.bias)
        seen += [
            weakref.ref(t) for part in made for name, t in part.weights.tensors().items() if name != "bias"
        ]
        assert layout.parts_of(layer.weight, layer.bias) is not made
        del weight, made
        assert [ref() for ref in seen] == [None] * len(seen)

    def test_are_made_anew_where_the_layer_moved(self, layer):
        here, parameters = layout.parts_of(layer.weight, layer.bias), dict(layer._parameters)
        layer.to(META)
        there = layout.parts_of(layer.weight, layer.bias)
        assert {t.device for part in there for t in part.weights.tensors().values()} == {META}
        layer._parameters.update(parameters)
        assert layout.parts_of(layer.weight, layer.bias) is here

    @pytest.mark.parametrize("which", ["buffer", "bias"])
    def test_a_tensor_with_other_memory_is_another_tensor(self, layer, which):
        weight, bias = layer.weight.clone(), layer.bias.clone()
        made = layout.parts_of(weight, bias)
        moved = {"buffer": weight._qdata, "bias": bias}[which]
        moved.data = moved.clone()
        again = layout.parts_of(weight, bias)
        assert again is not made and layout.parts_of(weight, bias) is again
        assert again[0].weights.codes.data_ptr() == weight._qdata.data_ptr()
        assert again[0].weights.bias.data_ptr() == bias.data_ptr()


def layers_of(model):
    return [layer for _, layer in quantized_linears(model.model)]


class TestTheHostCountsBranches:
    """A layer with a LoRA takes more VRAM, and the host's plan knows."""

    def test_in_the_size_of_the_model(self, quantized):
        tensors = loras.kohya()
        model = loras.stock(quantized, tensors)
        added = sum(t.nbytes for name, t in tensors.items() if not name.endswith("alpha"))
        assert model.model_size() == quantized.model_size() + added

    def test_clones_do_not_hand_it_on(self, quantized):
        model = loras.stock(quantized, loras.kohya()).clone()
        model.patches, model.patches_uuid = {}, None
        assert model.model_size() == model.clone().clone().model_size() == quantized.model_size()

    def test_in_what_is_loaded_and_what_is_freed(self, quantized):
        model = loras.stock(quantized, loras.kohya())
        load_part_of(model, most=True)
        loaded = [m for m in model.model.modules() if getattr(m, "comfy_patched_weights", False)]
        held = sum(p.nbytes for m in loaded for p in m.parameters(recurse=False))
        held += sum(t.nbytes for m in loaded for b in getattr(m, "branches", ()) for t in b.tensors)
        assert any(getattr(m, "branches", ()) for m in loaded)
        assert model.loaded_size() == held
        assert model.partially_unload(CPU, 10**9) == held
        model.detach()

    def test_an_entry_of_the_host_s_list_by_hand(self, quantized):
        """(bytes while streamed, bytes, name, module, parameters); another form is left alone."""
        key, layer = next(quantized_linears(quantized.model))
        name, more = key.removesuffix(".weight"), {key.removesuffix(".weight"): 7, "norm": 5}
        assert budget.counted((10, 100, name, layer, ()), more) == (17, 107, name, layer, ())
        assert budget.counted((10, 100, "other", layer, ()), more) == (10, 100, "other", layer, ())
        plain = torch.nn.Identity()
        assert budget.counted((10, 100, "norm", plain, ()), more) == (10, 100, "norm", plain, ())
        assert budget.counted((100, name, layer, ()), more) == (100, name, layer, ())

    @pytest.mark.parametrize("made", ["loha", "kohya", "comfy_names", "diffusers"])
    def test_the_plan_is_what_is_made(self, quantized, made):
        model = loras.stock(quantized, getattr(loras, made)())
        sizes = budget.branch_sizes(model)
        sample(model, steps=1)
        for key, layer in quantized_linears(model.model):
            held = sum(t.nbytes for b in layer.branches for t in b.tensors)
            assert held == sizes.get(key.removesuffix(".weight"), 0), key


class Same:
    """A tensor that equals itself only, so that lists of them can be compared."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __eq__(self, other):
        return self.tensor is other.tensor


def tensors(branches):
    return [Same(t) for b in branches for t in b.tensors]


META = torch.device("meta")  # stands for VRAM: tensors can go there, and say that they are there


class TestBranchesGoWithTheirLayer:
    """With a device that holds no numbers in the place of a GPU."""

    @pytest.fixture
    def loaded(self, quantized):
        model = loras.stock(quantized, loras.kohya()).clone()
        sample(model, steps=1)
        yield layers_of(model)
        model.detach()

    def test_moved_there_and_back(self, loaded):
        for layer in filter(lambda layer: layer.branches, loaded):
            parameters = dict(layer._parameters)
            layer.to(META)
            assert {same.tensor.device for same in tensors(layer.branches)} == {META}
            copies = [weakref.ref(same.tensor) for same in tensors(layer.branches)]
            layer.to(META)
            assert [Same(ref()) for ref in copies] == tensors(layer.branches), "moved without need"
            layer._parameters.update(parameters)
            layer.to(CPU)
            assert tensors(layer.branches) == tensors(layer.residence.own), "copied back for nothing"
            assert not any(ref() is not None for ref in copies), "something keeps the copies in VRAM"

    def test_a_new_strength_moves_nothing(self, loaded):
        layer = next(layer for layer in loaded if layer.branches)
        layer.residence.take(layer.residence.own, META, META)
        before = tensors(layer.branches)
        weaker = [dataclasses.replace(b, strength=0.25 * b.strength) for b in layer.residence.own]
        layer.residence.take(weaker, META, META)
        assert tensors(layer.branches) == before

    def test_a_streamed_layer_keeps_no_copy(self, loaded):
        home = next(layer for layer in loaded if layer.branches).residence
        home.take(home.own, CPU, META)
        assert tensors(home.beside) == tensors(home.own)
        visit = home.at(META, image=False)
        copy = weakref.ref(visit[0].down)
        assert copy().device == META
        del visit
        assert copy() is None

    def test_under_dynamic_vram_copies_last_as_long_as_the_weights_image(self, loaded):
        home = next(layer for layer in loaded if layer.branches).residence
        home.take(home.own, CPU, META)
        first, second = (home.at(META, image=True) for _ in range(2))
        assert first[0].down is second[0].down
        copy = weakref.ref(first[0].down)
        del first, second
        assert copy() is not None
        home.at(META, image=False)
        assert copy() is None

    def test_unloading_leaves_none(self, loaded):
        home = next(layer for layer in loaded if layer.branches).residence
        home.take(home.own, META, META)
        copy = weakref.ref(home.beside[0].down)
        home.clear()
        assert copy() is None and home.at(META, image=False) == ()


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("weight", "compute", "pins", "expected"),
    [
        (CPU, CPU, True, residence.stay),
        (CPU, CUDA, True, residence.pinned),
        (CPU, CUDA, False, residence.stay),
        (CPU, torch.device("mps"), True, residence.stay),
    ],
    ids=["all-on-cpu", "streamed", "streamed-unlocked", "streamed-to-mps"],
)
def test_what_becomes_of_a_branch_in_ram(weight, compute, pins, expected):
    assert residence.chosen(weight, compute, pins) is expected


@pytest.mark.parametrize("waits", [False, True], ids=["the-host-waits", "the-host-does-not"])
def test_copies_wait_where_the_hosts_do(monkeypatch, waits):
    asked = []
    monkeypatch.setattr(comfy.model_management, "device_supports_non_blocking", lambda device: waits)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: asked.append((where, how)))
    residence.sent(META)(torch.ones(2))
    assert asked == [((META,), {"non_blocking": waits})]


def test_memory_that_cannot_be_locked_is_used_as_it_is(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("no accelerator")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    tensor = torch.ones(2)
    assert residence.pinned(tensor) is tensor
