"""One single block whose MLP's layers are finished together: every bit as apart, whatever happens in between."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from comfy.ldm.flux.layers import ModulationOut, SingleStreamBlock

from svdquant_nodes.svdquant.adapters import single_block
from svdquant_nodes.svdquant.adapters.operations import QuantizedLinear
from svdquant_nodes.svdquant.core.deferred import Deferred
from svdquant_nodes.svdquant.core.linear import Branch
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.inside_host.single_blocks import HIDDEN, TOKENS, Calls, fill, fill_second, make, run


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture
def apart():
    return make(installed=False)


@pytest.fixture
def model():
    return make()


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3000.0], ids=["usual", "beyond-fp16"])
def test_every_dtype(dtype, scale, calls):
    """fp16 has the host's own care for infinities behind it."""
    kind = layers.DTYPES[dtype]
    x = layers.random(2, TOKENS, HIDDEN, seed=1, scale=scale).to(kind)
    vec = layers.random(2, HIDDEN, seed=2, scale=scale).to(kind)
    want = run(make(kind, installed=False), x, vec)
    got = run(make(kind), x, vec)
    assert got.isfinite().all() and torch.equal(got, want) and calls == 1


def test_regions_with_a_modulation_of_their_own(model, apart, calls):
    """Where the host writes into the tensor that linear1 reads."""
    x = layers.random(1, TOKENS, HIDDEN, seed=1, dtype=torch.bfloat16)
    vec = layers.random(1, 2, HIDDEN, seed=2, dtype=torch.bfloat16)
    regions = [(0, 5, 0), (5, TOKENS, 1)]
    want = run(apart, x, vec, modulation_dims=regions)
    assert torch.equal(run(model, x, vec, modulation_dims=regions), want) and calls == 1


def test_modulated_from_outside(calls):
    """Chroma's blocks, which have no modulation of their own."""
    given = (layers.random(2, 1, HIDDEN, seed=i, dtype=torch.bfloat16) for i in range(3))
    vec = ModulationOut(*given)
    want = run(make(installed=False, modulation=False), vec=vec)
    assert torch.equal(run(make(modulation=False), vec=vec), want) and calls == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_outside_inference_mode_layers_are_computed_apart(model, apart, calls, mode):
    """As in the host's training node."""
    with torch.inference_mode(False), mode():
        assert torch.equal(run(model), run(apart)) and calls == 0


class Stop(Exception):
    pass


def test_an_error_in_attention_leaves_nothing_behind(model, apart, calls):
    def stop(attn, extra):
        raise Stop

    with pytest.raises(Stop):
        run(model, transformer_options={"patches": {"attn1_output_patch": [stop]}})
    assert (calls.begun, calls.finished) == (1, 0)
    assert torch.equal(run(model), run(apart)) and (calls.begun, calls.finished) == (2, 1)


def test_a_block_within_itself(model, apart, calls):
    """Attention that runs the same block on other tokens."""

    def inner(block):
        other = layers.random(2, TOKENS, HIDDEN, seed=8, dtype=torch.bfloat16)
        return lambda attn, extra: attn + run(block, other)

    ours, theirs = (
        run(block, transformer_options={"patches": {"attn1_output_patch": [inner(block)]}})
        for block in (model, apart)
    )
    assert torch.equal(ours, theirs) and calls == 2


def test_threads_meet_in_attention(model, apart):
    meeting, got = threading.Barrier(4, timeout=60), {}

    def wait(attn, extra):
        meeting.wait()
        return attn

    def work(seed):
        with torch.inference_mode():
            x = layers.random(1, TOKENS, HIDDEN, seed=seed, dtype=torch.bfloat16)
            vec = layers.random(1, HIDDEN, seed=seed, dtype=torch.bfloat16)
            options = {"patches": {"attn1_output_patch": [wait]}}
            got[seed] = run(model, x, vec, transformer_options=options), run(apart, x, vec)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and all(torch.equal(*pair) for pair in got.values())


def when(model, change):
    """A block's options whose attention does something to the model."""
    return {"patches": {"attn1_output_patch": [lambda attn, extra: (change(model.block), attn)[1]]}}


def lora(layer, seed=5):
    down = layers.random(4, layer.in_features, seed=seed, scale=0.1)
    return (Branch(down, layers.random(layer.out_features, 4, seed=seed + 1), 1.0, slice(None), slice(None)),)


def change_first(block):
    block.linear1.residence.take(lora(block.linear1), torch.device("cpu"), torch.device("cpu"))


def change_second(block):
    block.linear2.residence.take(lora(block.linear2), torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize("change", [change_first, change_second], ids=lambda f: f.__name__)
def test_a_lora_that_changes_during_attention(model, apart, calls, change):
    """Linear1 had been computed by then, linear2 had not."""
    ours, theirs = (run(block, transformer_options=when(block, change)) for block in (model, apart))
    assert torch.equal(ours, theirs) and calls == 1
    assert torch.equal(run(model), run(apart)) and calls == 2


SWAPPED = {
    "the-same-format": (lambda block: fill_second(block.linear2, seed=3), 1),
    "nvfp4": (lambda block: fill_second(block.linear2, "nvfp4"), 0),
    "in-one-part": (lambda block: fill(block.linear2, ("int4", HIDDEN, 5 * HIDDEN, 0, 0)), 0),
    "the-first-in-one-part": (lambda block: fill(block.linear1, ("int4", 7 * HIDDEN, HIDDEN, 0, 0)), 0),
}


@pytest.mark.parametrize(("swap", "count"), SWAPPED.values(), ids=SWAPPED)
def test_a_weight_that_was_swapped(model, apart, calls, swap, count):
    for block in (model.block, apart.block):
        swap(block)
    assert torch.equal(run(model), run(apart)) and calls == count


def test_a_weight_swapped_during_attention(model, apart, calls):
    def swap(block):
        fill_second(block.linear2, "nvfp4")

    ours, theirs = (run(block, transformer_options=when(block, swap)) for block in (model, apart))
    assert torch.equal(ours, theirs) and (calls.begun, calls.finished, calls.read) == (1, 0, 1)


def test_a_weight_that_was_moved_is_the_same(model, apart, calls):
    for block in (model.block, apart.block):
        block._apply(lambda t: t.clone())
    assert torch.equal(run(model), run(apart)) and calls == 1


def streamed(layer):
    """As a weight of dynamic VRAM for which there is no room."""
    layer._v, layer._v_signature = object(), None


@pytest.fixture
def dynamic(monkeypatch):
    """What the host asks of such a layer is answered with the weight that it has."""
    cast = QuantizedLinear._cast

    def on_cpu(self, device):
        marks = {name: self.__dict__.pop(name) for name in ("_v", "_v_signature") if name in self.__dict__}
        try:
            return cast(self, device)
        finally:
            self.__dict__.update(marks)

    monkeypatch.setattr(QuantizedLinear, "_cast", on_cpu)


@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_layers_that_are_streamed_take_their_own_forward(model, apart, calls, dynamic, name):
    layer = getattr(model.block, name)
    streamed(layer)
    assert torch.equal(run(model), run(apart)) and calls == 0
    layer._v_signature = b"resident"
    assert torch.equal(run(model), run(apart)) and calls == 1


@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_a_layer_that_loses_its_room_during_attention(model, apart, calls, dynamic, name):
    options = when(model, lambda block: streamed(getattr(block, name)))
    assert torch.equal(run(model, transformer_options=options), run(apart))
    assert (calls.begun, calls.finished, calls.read) == (1, 0, 1)


def test_no_graph_break(model, calls):
    x, vec = layers.random(1, TOKENS, HIDDEN, seed=1), layers.random(1, HIDDEN, seed=2)
    explained = torch._dynamo.explain(model.block)(x.bfloat16(), vec.bfloat16(), None)
    torch._dynamo.reset()
    assert explained.graph_break_count == 0, explained.break_reasons
    assert calls == 0


@pytest.mark.parametrize("name", ["mlp_act", "linear2"])
def test_a_child_compiled_in_place_is_given_plain_tensors(model, apart, calls, name):
    getattr(model.block, name).compile(backend="eager")
    assert torch.equal(run(model), run(apart)) and calls == 0
    torch._dynamo.reset()


def reads_it_as_a_whole(self, x, vec, pe, **_):
    y = self.linear1(x)
    return self.linear2(torch.nn.functional.silu(y)[..., : self.linear2.in_features])


def splits_it_otherwise(self, x, vec, pe, **_):
    mlp, qkv = torch.split(self.linear1(x), [4 * HIDDEN, 3 * HIDDEN], dim=-1)
    return self.linear2(torch.cat((qkv[..., :HIDDEN], self.mlp_act(mlp)), dim=-1))


def puts_something_between(self, x, vec, pe, **_):
    qkv, mlp = torch.split(self.linear1(x), [3 * HIDDEN, 4 * HIDDEN], dim=-1)
    mlp *= 0.5
    return self.linear2(torch.cat((qkv[..., :HIDDEN], self.mlp_act(mlp) + 1), dim=-1))


def uses_it_twice(self, x, vec, pe, **_):
    qkv, mlp = torch.split(self.linear1(x), [3 * HIDDEN, 4 * HIDDEN], dim=-1)
    y = self.linear2(torch.cat((qkv[..., :HIDDEN], self.mlp_act(mlp)), dim=-1))
    return y + mlp[..., :HIDDEN]


def attends_to_more(self, x, vec, pe, **_):
    qkv, mlp = torch.split(self.linear1(x), [3 * HIDDEN, 4 * HIDDEN], dim=-1)
    return torch.cat((qkv, self.mlp_act(mlp)), dim=-1)[..., : self.linear2.in_features]


OTHERS = [reads_it_as_a_whole, splits_it_otherwise, puts_something_between, uses_it_twice, attends_to_more]


@pytest.mark.parametrize("forward", OTHERS, ids=lambda f: f.__name__)
def test_a_host_that_computes_something_else_is_given_its_numbers(monkeypatch, calls, forward):
    """The next ComfyUI, or a pack that replaced the forward before the model was loaded."""
    monkeypatch.setattr(SingleStreamBlock, "forward", forward)
    got = run(make())
    assert type(got) is torch.Tensor and torch.equal(got, run(make(installed=False)))
    assert calls.begun == calls.read == 1


def test_during_attention_the_mlp_s_share_is_not_in_memory(model):
    """Neither computed nor reserved: what is kept is linear1's quantized input."""
    found = []

    def look(attn, extra):
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, Deferred)]
        found.extend((type(t), t.shape[-1]) for t in tensors if t.shape[:2] == (2, TOKENS))
        return attn

    run(model, transformer_options={"patches": {"attn1_output_patch": [look]}})
    assert (Deferred, 4 * HIDDEN) in found and (torch.Tensor, HIDDEN) in found
    assert not {(torch.Tensor, 4 * HIDDEN), (torch.Tensor, 7 * HIDDEN)} & set(found)


def test_a_model_is_freed_with_its_last_reference():
    model = make()
    run(model)
    gc.collect()
    gc.disable()
    try:
        layer, block = weakref.ref(model.block.linear1), weakref.ref(model.block)
        del model
        assert layer() is None and block() is None
    finally:
        gc.enable()


LEFT_ALONE = {
    "nvfp4-behind": dict(second="nvfp4"),
    "shifted-before": dict(first="int4-unsigned"),
}


@pytest.mark.parametrize("formats", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_no_pair_is_left_alone(formats):
    assert single_block.install(make(installed=False, **formats)) == 0


def test_nvfp4_at_once(calls):
    formats = dict(first="nvfp4", second="nvfp4")
    assert torch.equal(run(make(**formats)), run(make(installed=False, **formats))) and calls == 1


@pytest.mark.parametrize("fused", ["gemm_int4_gelu", "gemm_nvfp4_gelu"])
def test_pairs_of_an_op_that_a_device_does_not_fuse_are_left_alone(fused):
    pairs = {
        "gemm_int4_gelu": make(installed=False),
        "gemm_nvfp4_gelu": make(first="nvfp4", second="nvfp4", installed=False),
    }
    assert {op: single_block.install(model, [fused]) for op, model in pairs.items()} == {
        op: op == fused for op in pairs
    }


@pytest.mark.parametrize("change", [SWAPPED["in-one-part"][0], SWAPPED["the-first-in-one-part"][0]])
def test_a_layer_in_one_part_is_left_alone(apart, change):
    change(apart.block)
    assert single_block.install(apart) == 0


def test_another_activation_is_left_alone(apart):
    apart.block.mlp_act = torch.nn.GELU()
    assert single_block.install(apart) == 0
