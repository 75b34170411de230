"""Everything else the host lets a node do to a model: block patches, wrappers, merges, batch, guidance, compile."""

from __future__ import annotations

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from svdquant_nodes.tests.inside_host import loras
from svdquant_nodes.tests.inside_host.twins import conditioning, error, sample
from svdquant_nodes.tests.tolerances import assert_close


def test_block_replacement_is_called_and_changes_nothing(quantized):
    calls = []

    def passthrough(args, extra):
        calls.append(sorted(args))
        return extra["original_block"](args)

    patched = quantized.clone()
    patched.set_model_patch_replace(passthrough, "dit", "double_block", 0)
    assert torch.equal(sample(patched), sample(quantized))
    assert len(calls) == 3


def test_diffusion_model_wrapper_is_called(quantized):
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(args[0].shape)
        return executor(*args, **kwargs)

    wrapped = quantized.clone()
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    assert torch.equal(sample(wrapped), sample(quantized))
    assert len(calls) == 3


def test_weight_wrapper_of_another_node_is_honoured(twins):
    key = "diffusion_model.single_blocks.0.linear2.weight"
    doubled = [model.clone() for model in (twins.quantized, twins.dense)]
    for model in doubled:
        model.add_weight_wrapper(key, lambda weight: weight * 1.5)
    ours, theirs = map(sample, doubled)
    assert error(theirs, sample(twins.dense)) > 0.01
    assert_close(ours, theirs, "host_twin")


def test_a_dense_weight_from_the_host_comes_with_the_bias_of_files(twins):
    """As dynamic VRAM hands it over for a product on the CPU."""
    layer = twins.quantized.model.diffusion_model.double_blocks[0].img_mlp[2]
    assert layer.compensation(layer.bias).abs().max() > 1e-3, "the layer's activations are not shifted"
    x = torch.randn(3, layer.in_features)
    packed, dense = (
        layer._forward_dense(x, w, layer.bias, ()) for w in (layer.weight, layer.weight.dequantize())
    )
    assert_close(dense, packed, "host_dense_branch")


def test_key_patches_give_the_dense_layer(twins):
    ours, theirs = (model.get_key_patches("diffusion_model.") for model in (twins.quantized, twins.dense))
    assert {k.replace("_norm.scale", "_norm.weight") for k in ours} == {
        k.replace("_norm.scale", "_norm.weight") for k in theirs
    }
    for key, [(value, convert), *_] in ours.items():
        expected = theirs[key][0][0]
        assert torch.allclose(convert(value.to(torch.float32)), expected, atol=1e-6, rtol=1e-5), key


@pytest.mark.parametrize("into", ["dense", "quantized"])
def test_merging_with_its_own_twin_changes_nothing(twins, into):
    base, other = (twins.dense, twins.quantized) if into == "dense" else (twins.quantized, twins.dense)
    merged = base.clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
    assert_close(sample(merged), sample(twins.dense), "host_dense_branch")


def test_batch_and_guidance(twins):
    arguments = dict(positive=conditioning(3), negative=conditioning(4), cfg=3.0, batch=3)
    assert_close(sample(twins.quantized, **arguments), sample(twins.dense, **arguments), "host_twin")


def test_object_patch_is_undone(quantized):
    before = sample(quantized)
    patched = quantized.clone()
    patched.add_object_patch("diffusion_model.single_blocks.0.linear2.bias", None)
    assert not torch.equal(sample(patched), before)
    assert torch.equal(sample(quantized), before)


def test_no_graph_break_in_a_block(quantized):
    from comfy.model_management import load_models_gpu

    load_models_gpu([quantized])
    model = quantized.model.diffusion_model
    x, vec = torch.randn(1, 22, 256), torch.randn(1, 256)
    pe = model.pe_embedder(torch.zeros(1, 22, 3))
    double = dict(img=x[:, 6:], txt=x[:, :6], vec=vec, pe=pe)
    for block, arguments in (
        (model.single_blocks[0], dict(x=x, vec=vec, pe=pe)),
        (model.double_blocks[0], double),
    ):
        explained = torch._dynamo.explain(block.forward)(**arguments)
        assert explained.graph_break_count == 0, explained.break_reasons
        torch._dynamo.reset()


def test_compiled_as_the_host_compiles(quantized):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = quantized.clone()
    blocks = [
        "diffusion_model.double_blocks.0",
        "diffusion_model.single_blocks.0",
        "diffusion_model.single_blocks.1",
    ]
    set_torch_compile_wrapper(compiled, backend="eager", keys=blocks)
    assert_close(sample(compiled), sample(quantized), "host_twin")


@pytest.mark.skipif(not hasattr(ModelPatcher, "deepclone_multigpu"), reason="this host knows no second GPU")
def test_a_model_of_its_own_for_a_second_gpu_has_the_loras_too(twins):
    """The host loads the model again for every further GPU; the CPU stands for one."""
    joined = loras.stock(twins.quantized, loras.kohya())
    expected = sample(joined)
    second = joined.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert second.model is not joined.model
    assert torch.equal(sample(second), expected)
    assert torch.equal(sample(joined), expected)
    assert error(sample(twins.quantized), expected) > 1e-3


def test_saving_is_refused_in_words(quantized, tmp_path):
    import comfy.sd

    for model in (quantized, quantized.clone()):
        with pytest.raises(ValueError, match=r"cannot be saved by ComfyUI's save nodes.*convert"):
            comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    assert list(tmp_path.iterdir()) == []
