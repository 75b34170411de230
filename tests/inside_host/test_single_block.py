"""FLUX's single blocks with the MLP's layers finished together: the same bits, whatever is done to a block.

Where no kernel does it, as on a CPU, the op is its parts one after the other: whatever is wrong around it shows.
"""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.flux import layers as host
from torch.utils._pytree import tree_leaves

from svdquant_nodes.svdquant.adapters import single_block
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import QuantizedLinear
from svdquant_nodes.svdquant.kernels import ops
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.single_blocks import Calls
from svdquant_nodes.tests.inside_host.twins import DEMO_INT4, conditioning, sample

BLOCK = "diffusion_model.single_blocks.0"
STEPS, BLOCKS = 3, 2  # of `sample`; of the demo


@pytest.fixture(scope="module")
def together():
    """The demo model whose single blocks finish together; `quantized` is the same without."""
    with torch.inference_mode():
        model = load_model(DEMO_INT4)
        assert single_block.install(model.model) == BLOCKS
    return model


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.mark.parametrize("batch", [1, 2], ids="batch-{}".format)
@pytest.mark.parametrize("cfg", [1.0, 3.0], ids="cfg-{}".format)
def test_the_same_picture(together, quantized, calls, batch, cfg):
    asked = dict(batch=batch, cfg=cfg, negative=conditioning(4))
    want = sample(quantized, **asked)
    assert calls == 0
    assert torch.equal(sample(together, **asked), want)
    assert calls == STEPS * BLOCKS


def test_names_and_classes_are_the_host_s(together, quantized):
    mine, theirs = (model.get_model_object(BLOCK) for model in (together, quantized))
    assert type(mine) is type(theirs) is host.SingleStreamBlock and repr(mine) == repr(theirs)
    assert list(together.model.state_dict()) == list(quantized.model.state_dict())
    for names in (torch.nn.Module.named_modules, torch.nn.Module.named_parameters):
        assert [name for name, _ in names(together.model)] == [name for name, _ in names(quantized.model)]


@pytest.mark.parametrize("kind", [loras.kohya, loras.diffusers, loras.loha], ids=lambda f: f.__name__)
def test_a_lora_of_rank_joins_and_leaves(together, quantized, calls, kind):
    before = sample(quantized)
    ours, theirs = (loras.stock(model, kind()) for model in (together, quantized))
    want = sample(theirs)
    assert not torch.equal(want, before)
    assert torch.equal(sample(ours), want)
    assert torch.equal(sample(together), before)
    assert calls == 2 * STEPS * BLOCKS


@pytest.mark.parametrize("layer", ["linear1", "linear2"])
def test_a_difference_takes_the_layers_own_forward(together, quantized, calls, layer):
    key, (ours, theirs) = f"{BLOCK}.{layer}.weight", (together.clone(), quantized.clone())
    difference = layers.random(*ours.get_model_object(key).shape, seed=1, scale=0.01)
    for model in (ours, theirs):
        assert model.add_patches({key: ("diff", (difference,))}, 0.5) == [key]
    want = sample(theirs)
    assert not torch.equal(want, sample(quantized))
    assert torch.equal(sample(ours), want)
    assert calls == STEPS * (BLOCKS - 1)


def a_weight_wrapper(model):
    model.add_weight_wrapper(f"{BLOCK}.linear2.weight", lambda weight: weight * 1.5)


def another_activation(model):
    model.add_object_patch(f"{BLOCK}.mlp_act", torch.nn.ReLU())


def another_layer(model):
    inner = model.get_model_object(f"{BLOCK}.linear1")
    model.add_object_patch(f"{BLOCK}.linear1", torch.nn.Sequential(inner, torch.nn.Softsign()))


def another_second_layer(model):
    like = model.get_model_object(f"{BLOCK}.linear2")

    class Means(torch.nn.Module):
        def forward(self, x):
            return x.unflatten(-1, (like.out_features, -1)).mean(-1)

    model.add_object_patch(f"{BLOCK}.linear2", Means())


OBJECTS = [a_weight_wrapper, another_activation, another_layer, another_second_layer]


@pytest.mark.parametrize("change", OBJECTS, ids=lambda f: f.__name__)
def test_what_other_nodes_do_to_its_layers_is_done(together, quantized, calls, change):
    ours, theirs, before = together.clone(), quantized.clone(), sample(quantized)
    for model in (ours, theirs):
        change(model)
    want = sample(theirs)
    assert not torch.equal(want, before)
    assert torch.equal(sample(ours), want)
    assert calls == STEPS * (BLOCKS - 1)
    assert torch.equal(sample(together), before) and torch.equal(sample(quantized), before)


def after_attention(model):
    model.set_model_patch(lambda attn, extra: attn * 0.5, "attn1_output_patch")


def before_attention(model):
    def patch(q, k, v, **_):
        return {"q": q * 0.5, "v": v * 2}

    model.set_model_patch(patch, "attn1_patch")


def around_a_block(model):
    def patch(args, extra):
        return {"img": extra["original_block"](args)["img"] * 0.5}

    model.set_model_patch_replace(patch, "dit", "single_block", 0)


def in_place_of_a_block(model):
    block = model.get_model_object(BLOCK)

    class Half(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return block(*args, **kwargs) * 0.5

    model.add_object_patch(BLOCK, Half())


AROUND = [after_attention, before_attention, around_a_block, in_place_of_a_block]


@pytest.mark.parametrize("change", AROUND, ids=lambda f: f.__name__)
def test_patches_of_attention_and_of_whole_blocks(together, quantized, calls, change):
    """All go through the host's forward, which is still in charge."""
    ours, theirs, before = together.clone(), quantized.clone(), sample(quantized)
    for model in (ours, theirs):
        change(model)
    assert torch.equal(sample(ours), sample(theirs))
    assert calls == STEPS * BLOCKS
    assert torch.equal(sample(together), before) and torch.equal(sample(quantized), before)


@pytest.mark.parametrize("path", ["", ".linear1", ".mlp_act", ".linear2", ".norm"])
def test_hooks_see_what_they_always_saw(together, quantized, calls, path):
    seen, pictures = [], []
    for model in (together, quantized):
        module = model.get_model_object(BLOCK + path)
        watching = module.register_forward_hook(lambda module, args, output: seen.append((args, output)))
        pictures.append(sample(model))
        watching.remove()
    half = len(seen) // 2
    assert torch.equal(*pictures) and half == STEPS
    for mine, theirs in zip(seen[:half], seen[half:], strict=True):
        for one, other in zip(tree_leaves(mine), tree_leaves(theirs), strict=True):
            assert type(one) is type(other) and (not isinstance(one, torch.Tensor) or torch.equal(one, other))
    assert calls == STEPS * (BLOCKS if path in ("", ".norm") else BLOCKS - 1)


@pytest.mark.parametrize("path", ["", ".linear1", ".linear2"], ids=["block", "linear1", "linear2"])
def test_a_forward_of_another_node_is_called(together, quantized, calls, path):
    module, seen = together.get_model_object(BLOCK + path), []
    module.forward = lambda *args, **kwargs: (
        seen.append(args) or type(module).forward(module, *args, **kwargs)
    )
    try:
        assert torch.equal(sample(together), sample(quantized))
    finally:
        del module.forward
    assert len(seen) == STEPS and calls == STEPS * (BLOCKS - 1)


def test_a_forward_put_into_the_host_s_class_is_called(together, quantized, calls, monkeypatch):
    real = host.SingleStreamBlock.forward
    monkeypatch.setattr(
        host.SingleStreamBlock, "forward", lambda *args, **kwargs: real(*args, **kwargs) * 0.5
    )
    assert torch.equal(sample(together), sample(quantized))
    assert calls == 0


def test_compiled_as_the_host_compiles(together, quantized, calls):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = [model.clone() for model in (together, quantized)]
    for model in compiled:
        set_torch_compile_wrapper(model, backend="eager", keys=[BLOCK])
    assert torch.equal(*map(sample, compiled))
    assert calls == STEPS * (BLOCKS - 1)
    torch._dynamo.reset()


def test_not_where_nothing_is_won(quantized):
    """A CPU has no kernel for it: loading leaves the layers alone."""
    assert all(layer.together is None for layer in linears(quantized.model))


@pytest.mark.parametrize(("fused", "blocks"), [("gemm_int4_gelu", BLOCKS), ("gemm_nvfp4_gelu", 0)])
def test_loaded_so_where_a_kernel_does_it(monkeypatch, quantized, calls, fused, blocks):
    monkeypatch.setattr(ops, "fuses", lambda op, kind, index: op == fused)
    model = load_model(DEMO_INT4)
    assert sum(layer.together is not None for layer in linears(model.model)) == 2 * blocks
    assert torch.equal(sample(model), sample(quantized))
    assert calls == STEPS * blocks


def test_eight_bits_are_left_alone():
    assert single_block.install(load_model(DEMO_INT4, activations="8 bit").model) == 0


def linears(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]
