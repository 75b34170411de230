"""Two layers and the GELU between computed together: the same bits, and nothing hidden from anyone.

Where no kernel does it, as on a CPU, the op is its parts one after the other: whatever is wrong around it shows.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import Mlp
from comfy.ldm.qwen_image.model import FeedForward

from svdquant_nodes.svdquant.adapters import feed_forward, layout
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import make_operations
from svdquant_nodes.svdquant.core import linear
from svdquant_nodes.svdquant.core.linear import Part
from svdquant_nodes.svdquant.kernels import ops
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.inside_host import loras, small
from svdquant_nodes.tests.inside_host.twins import DEMO_INT4, sample
from svdquant_nodes.tests.small_models import detecting

MLP = "diffusion_model.double_blocks.0.img_mlp"
STEPS, MODULES = 3, 2  # of `sample`; img_mlp and txt_mlp of the demo's one double block


@pytest.fixture(scope="module")
def together():
    """The demo model with what computes its feed-forwards together; `quantized` is the same without."""
    with torch.inference_mode():
        model = load_model(DEMO_INT4)
        assert feed_forward.install(model.model) == MODULES
    return model


@pytest.fixture
def calls(monkeypatch):
    """Outputs of every pair that was computed together; None for one that could not be."""
    found, real = [], linear.forward_pair

    def record(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(linear, "forward_pair", record)
    return found


def computed(calls):
    return sum(call is not None for call in calls)


def test_the_same_picture(together, quantized, calls):
    want = sample(quantized)
    assert not calls
    assert torch.equal(sample(together), want)
    assert computed(calls) == STEPS * MODULES


def test_names_and_access_are_the_host_s(together, quantized):
    """As LoRA loaders, savers and other nodes see it."""
    mine, theirs = (model.get_model_object(MLP) for model in (together, quantized))
    assert type(theirs) is torch.nn.Sequential
    assert isinstance(mine, torch.nn.Sequential) and len(mine) == 3 and repr(mine) == repr(theirs)
    assert list(together.model.state_dict()) == list(quantized.model.state_dict())
    for names in (torch.nn.Module.named_modules, torch.nn.Module.named_parameters):
        assert [name for name, _ in names(together.model)] == [name for name, _ in names(quantized.model)]


@pytest.mark.parametrize("kind", [loras.kohya, loras.diffusers, loras.loha], ids=lambda f: f.__name__)
def test_a_lora_of_rank_joins(together, quantized, calls, kind):
    ours, theirs = (loras.stock(model, kind()) for model in (together, quantized))
    assert torch.equal(sample(ours), sample(theirs))
    assert computed(calls) == STEPS * MODULES


def on_mlp(patch):
    def lora(model):
        model = model.clone()
        key = f"{MLP}.0.weight"
        assert model.add_patches({key: patch(model.get_model_object(f"{MLP}.0").weight.shape)}, 0.5) == [key]
        return model

    return lora


def a_difference(shape):
    return "diff", (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 0.01,)


def test_a_difference_takes_the_layers_own_forward(together, quantized, calls):
    ours, theirs = map(on_mlp(a_difference), (together, quantized))
    want = sample(theirs)
    assert not torch.equal(want, sample(quantized))
    calls.clear()
    assert torch.equal(sample(ours), want)
    assert computed(calls) == STEPS  # the text's, which has none


def a_weight_wrapper(model):
    model.add_weight_wrapper(f"{MLP}.2.weight", lambda weight: weight * 1.5)


def another_activation(model):
    model.add_object_patch(f"{MLP}.1", torch.nn.ReLU())


def another_module(model):
    layer = model.get_model_object(f"{MLP}.0")
    model.add_object_patch(
        MLP, torch.nn.Sequential(layer, torch.nn.ReLU(), model.get_model_object(f"{MLP}.2"))
    )


def another_block(model):
    block = model.get_model_object("diffusion_model.double_blocks.0")

    class Half(torch.nn.Module):
        def forward(self, *args, **kwargs):
            img, txt = block(*args, **kwargs)
            return img * 0.5, txt

    model.add_object_patch("diffusion_model.double_blocks.0", Half())


@pytest.mark.parametrize(
    "change", [a_weight_wrapper, another_activation, another_module], ids=lambda f: f.__name__
)
def test_what_other_nodes_do_to_it_is_done(together, quantized, calls, change):
    ours, theirs, before = together.clone(), quantized.clone(), sample(quantized)
    for model in (ours, theirs):
        change(model)
    want = sample(theirs)
    assert not torch.equal(want, before)
    calls.clear()
    assert torch.equal(sample(ours), want)
    assert computed(calls) == STEPS
    assert torch.equal(sample(together), before) and torch.equal(sample(quantized), before)


def test_a_patch_of_the_whole_block(together, quantized):
    ours, theirs, before = together.clone(), quantized.clone(), sample(quantized)
    for model in (ours, theirs):
        another_block(model)
    assert torch.equal(sample(ours), sample(theirs))
    assert torch.equal(sample(together), before) and torch.equal(sample(quantized), before)


@pytest.mark.parametrize("path", ["", ".0", ".1", ".2"], ids=["module", "first", "gelu", "second"])
def test_hooks_are_called(together, quantized, calls, path):
    seen, pictures = [], []
    for model in (together, quantized):
        module = model.get_model_object(MLP + path)
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        pictures.append(sample(model))
        handle.remove()
    assert torch.equal(*pictures)
    assert len(seen) == 2 * STEPS and all(map(torch.equal, seen[:STEPS], seen[STEPS:]))
    assert computed(calls) == STEPS * (1 if path else MODULES)


def test_a_forward_of_another_node_is_called(together, quantized, calls):
    """Some replace a layer's forward on the instance, as the host's own bypass loader does."""
    layer, seen = together.get_model_object(f"{MLP}.0"), []
    layer.forward = lambda x: seen.append(x.shape) or type(layer).forward(layer, x)
    try:
        assert torch.equal(sample(together), sample(quantized))
    finally:
        del layer.forward
    assert len(seen) == STEPS and computed(calls) == STEPS


def test_layers_that_are_streamed_take_their_own_forward(together, quantized, monkeypatch, calls):
    before = sample(quantized)
    layer = together.get_model_object(f"{MLP}.2")
    layer._v, layer._v_signature = object(), None  # a weight of dynamic VRAM for which there was no room
    cast = feed_forward.QuantizedLinear._cast

    def on_cpu(self, device):
        marks = {name: self.__dict__.pop(name) for name in ("_v", "_v_signature") if name in self.__dict__}
        try:
            return cast(self, device)
        finally:
            self.__dict__.update(marks)

    monkeypatch.setattr(feed_forward.QuantizedLinear, "_cast", on_cpu)
    try:
        assert torch.equal(sample(together), before)
        assert computed(calls) == STEPS
        layer._v_signature = b"resident"
        calls.clear()
        assert torch.equal(sample(together), before)
        assert computed(calls) == STEPS * MODULES
    finally:
        del layer._v, layer._v_signature


def test_no_graph_break(together):
    from comfy.model_management import load_models_gpu

    load_models_gpu([together])
    module = together.model.diffusion_model.double_blocks[0].img_mlp
    explained = torch._dynamo.explain(module)(torch.randn(1, 6, 256))
    torch._dynamo.reset()
    assert explained.graph_break_count == 0, explained.break_reasons


def test_not_where_nothing_is_won(quantized):
    """A CPU has no kernel for it: loading leaves the host's modules alone."""
    assert not any(isinstance(module, feed_forward.Together) for module in quantized.model.modules())


@pytest.mark.parametrize(("fused", "pairs"), [("gemm_int4_gelu", MODULES), ("gemm_nvfp4_gelu", 0)])
def test_loaded_so_where_a_kernel_does_it(monkeypatch, quantized, calls, fused, pairs):
    monkeypatch.setattr(ops, "fuses", lambda op, kind, index: op == fused)
    assert torch.equal(sample(load_model(DEMO_INT4)), sample(quantized))
    assert computed(calls) == STEPS * pairs


def test_eight_bits_are_left_alone():
    assert feed_forward.install(load_model(DEMO_INT4, activations="8 bit").model) == 0


FAMILIES = {"pixart-sigma": 1, "chroma": 2, "wan": 2, "sdxl": 0, "z-image": 0}  # pairs in its small model


@pytest.mark.parametrize(("family", "count"), FAMILIES.items(), ids=FAMILIES)
def test_families(family, count, tmp_path, calls):
    path = tmp_path / "model.safetensors"
    small.write(family, path)
    with detecting():
        model, patched = load_model(path), load_model(path)
    assert feed_forward.install(patched.model) == count
    assert torch.equal(small.sample(family, patched), small.sample(family, model))
    assert computed(calls) == count


def fill(layer, name, n, k):
    """Give a host's linear quantized weights."""
    weights = layers.random_linear(name, n, k)
    packed = layout.pack([Part(replace(weights, bias=None))], torch.bfloat16)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.bias = torch.nn.Parameter(weights.bias, requires_grad=False)


def sequential(between, first="int4", second="int4-unsigned"):
    """Two 4-bit layers with something between them, in a model."""
    layout.register()
    linear = make_operations(ops).Linear
    model = torch.nn.Module()
    model.mlp = torch.nn.Sequential(linear(64, 128), between, linear(128, 64))
    fill(model.mlp[0], first, 128, 64)
    fill(model.mlp[2], second, 64, 128)
    return model


PAIRS = {"int4": ("int4", "int4-unsigned"), "int4-signed": ("int4", "int4"), "nvfp4": ("nvfp4", "nvfp4")}


@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_two_layers_and_their_gelu(names, calls):
    model, x = sequential(torch.nn.GELU(approximate="tanh"), *names), layers.random(2, 5, 64, seed=3)
    want = model.mlp(x.to(torch.bfloat16))
    assert feed_forward.install(model) == 1
    assert torch.equal(model.mlp(x.to(torch.bfloat16)), want) and computed(calls) == 1


def in_training():
    """PixArt's and SD 3's class, with a dropout that drops."""
    model = torch.nn.Module()
    gelu = functools.partial(torch.nn.GELU, approximate="tanh")
    sizes = dict(dtype=torch.bfloat16, device="cpu")
    model.mlp = Mlp(64, 128, act_layer=gelu, operations=make_operations(ops), **sizes)
    fill(model.mlp.fc1, "int4", 128, 64)
    fill(model.mlp.fc2, "int4-unsigned", 64, 128)
    model.mlp.drop1 = torch.nn.Dropout(0.1)
    return model


OTHERS = {
    "exact-gelu": lambda: sequential(torch.nn.GELU()),
    "silu": lambda: sequential(torch.nn.SiLU()),
    "nothing-between": lambda: sequential(torch.nn.Identity()),
    "shifted-before": lambda: sequential(torch.nn.GELU(approximate="tanh"), first="int4-unsigned"),
    "two-formats": lambda: sequential(torch.nn.GELU(approximate="tanh"), second="nvfp4"),
    "dropout-that-drops": in_training,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_something_else_is_left_alone(make):
    assert feed_forward.install(make()) == 0


def test_qwen_image_s_class(calls):
    """Whose linears lie two modules deep; the small model keeps the second one in 16 bits."""
    layout.register()
    model, sizes = torch.nn.Module(), dict(dtype=torch.bfloat16, device="cpu")
    model.img_mlp = FeedForward(64, 64, inner_dim=128, operations=make_operations(ops), **sizes)
    fill(model.img_mlp.net[0].proj, "int4", 128, 64)
    fill(model.img_mlp.net[2], "int4-unsigned", 64, 128)
    x = layers.random(2, 5, 64, seed=3, dtype=torch.bfloat16)
    want = model.img_mlp(x)
    assert feed_forward.install(model) == 1
    assert torch.equal(model.img_mlp(x), want) and computed(calls) == 1
