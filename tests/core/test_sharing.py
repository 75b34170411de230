"""One quantization for linears that read the same input: the same bits as without, and never those of another x."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from svdquant_nodes.svdquant.core import linear, reference, weight_only
from svdquant_nodes.svdquant.core.linear import Branch, Part
from svdquant_nodes.svdquant.core.sharing import Input, Reader, Slot
from svdquant_nodes.tests import layers

ALL = slice(None)
SHARING = [name for name in layers.COMPUTED if name != "awq"]


class Counting:
    """The reference, counting its quantizers' calls."""

    def __init__(self, ops=reference):
        self.ops, self.quantized = ops, 0

    def __getattr__(self, name):
        self.quantized += name.startswith("quantize")
        return getattr(self.ops, name)


def readers(name="int4", count=3, dtype=torch.bfloat16, k=128):
    """Parts with rows of their own, and smoothing and branch input in common, each in tensors of its own."""
    shared, parts = Input("qkv", count), []
    like = layers.random_linear(name, 32, k, 8, dtype=dtype)
    for i in range(count):
        own = layers.random_linear(name, 32, k, 8, dtype=dtype, seed=10 * i)
        own = dataclasses.replace(own, bias=None, smooth=like.smooth.clone(), down=like.down.clone())
        parts.append(Part(own, reader=Reader(shared, i)))
    return parts


def run(x, part, ops, slot, branches=()):
    return linear.forward(x, [part], None, branches, ops, slot)


@pytest.fixture(params=["inference-mode", "no-grad"])
def mode(request):
    with torch.inference_mode() if request.param == "inference-mode" else torch.no_grad():
        yield


@pytest.fixture
def x():
    return layers.random(2, 5, 128, seed=9, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", layers.DTYPES)
@pytest.mark.parametrize("name", SHARING)
def test_one_quantization_and_the_same_bits(name, dtype, mode):
    kind = layers.DTYPES[dtype]
    parts, ops, slot = readers(name, dtype=kind), Counting(), Slot()
    x = layers.random(2, 5, 128, seed=9, dtype=kind)
    for part in parts:
        assert torch.equal(run(x, part, ops, slot), run(x, part, reference, None))
    assert ops.quantized == 1


def test_parts_of_one_layer_share_too(x, mode):
    parts, ops = [dataclasses.replace(p, row=32 * i) for i, p in enumerate(readers())], Counting()
    y = linear.forward(x, parts, None, (), ops, Slot())
    assert torch.equal(y, linear.forward(x, parts, None, (), reference)) and ops.quantized == 1


def test_a_part_that_is_no_reader_leaves_the_slot_alone(x, mode):
    (q, k, _), ops, slot = readers(), Counting(), Slot()
    for part in (q, dataclasses.replace(k, reader=None), k):
        run(x, part, ops, slot)
    assert ops.quantized == 2


# ---- another x ----


OTHERS = {
    "an-equal-copy": lambda x: x.clone(),
    "a-view": lambda x: x[:],
    "another-shape": lambda x: x[:1],
    "another-dtype": lambda x: x.float(),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_tensor_is_quantized_anew(other, x, mode):
    (q, k, _), ops, slot = readers(), Counting(), Slot()
    run(x, q, ops, slot)
    assert torch.equal(run(other(x), k, ops, slot), run(other(x), k, reference, None))
    assert ops.quantized == 2


CHANGES = {
    "written-to": lambda x: x.mul_(2),
    "written-to-through-a-view": lambda x: x[0].zero_(),
    "other-memory": lambda x: setattr(x, "data", 2 * x),
    "other-strides": lambda x: x.t_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tensor_is_quantized_anew(change):
    """Where versions are counted; in inference mode memory and shape alone tell."""
    (q, k, _), slot = readers(), Slot()
    with torch.no_grad():
        x = layers.random(128, 128, seed=9, dtype=torch.bfloat16)
        run(x, q, reference, slot)
        change(x)
        assert torch.equal(run(x, k, reference, slot), run(x, k, reference, None))


def test_a_reader_that_comes_again_begins_anew():
    """As with a buffer that a host fills again for the next step: nothing else would tell in inference mode."""
    (q, k, v), ops, slot = readers(), Counting(), Slot()
    with torch.inference_mode():
        x = layers.random(5, 128, seed=9, dtype=torch.bfloat16)
        for part in (q, k):  # v stays away, so the slot is not emptied
            run(x, part, ops, slot)
        x.mul_(-3)
        for part in (q, k, v):
            assert torch.equal(run(x, part, ops, slot), run(x, part, reference, None))
    assert ops.quantized == 2


def test_another_model_has_inputs_of_its_own(x, mode):
    """Two loads of a file, or layers of one put into the other: names agree, smoothing need not."""
    (q, *_), (_, k, _) = readers(), readers()
    k = dataclasses.replace(k, weights=dataclasses.replace(k.weights, smooth=2 * k.weights.smooth))
    slot = Slot()
    run(x, q, reference, slot)
    assert torch.equal(run(x, k, reference, slot), run(x, k, reference, None))


def test_two_inputs_in_turns_are_never_mixed_up(x, mode):
    image, text, slot = readers(), readers(), Slot()
    other = layers.random(3, 128, seed=4, dtype=torch.bfloat16)
    for one, two in zip(image, text, strict=True):
        assert torch.equal(run(x, one, reference, slot), run(x, one, reference, None))
        assert torch.equal(run(other, two, reference, slot), run(other, two, reference, None))


# ---- who does not share ----


def test_rank_of_a_lora_is_read_alone(x, mode):
    q, k, v = readers()
    lora = Branch(layers.random(4, 128, seed=1), layers.random(32, 4, seed=2), 0.5, ALL, ALL)
    ops, slot = Counting(), Slot()
    for part, branches in ((q, ()), (k, (lora,)), (v, ())):
        assert torch.equal(run(x, part, ops, slot, branches), run(x, part, reference, None, branches))
    assert ops.quantized == 2


def test_what_has_no_rank_is_added_beside_a_shared_input(x, mode):
    q, k, _ = readers()
    dense, ops, slot = Branch(layers.random(32, 128, seed=1), None, 0.5, ALL, ALL), Counting(), Slot()
    run(x, q, ops, slot)
    assert torch.equal(run(x, k, ops, slot, [dense]), run(x, k, reference, None, [dense]))
    assert ops.quantized == 1


def test_gradients_are_each_ones_own():
    (q, k, _), ops, slot = readers(dtype=torch.float32), Counting(), Slot()
    x = layers.random(5, 128, seed=9).requires_grad_()
    for part in (q, k):
        run(x, part, ops, slot)
    assert ops.quantized == 2


def test_a_subclass_of_tensor_may_mean_something_else(x):
    class Other(torch.Tensor):
        pass

    (q, k, _), ops, slot = readers(), Counting(), Slot()
    other = x.as_subclass(Other)
    for part in (q, k):
        run(other, part, ops, slot)
    assert ops.quantized == 2


def test_a_compiled_graph_quantizes_for_each(x):
    parts, slot = readers(), Slot()

    def attention(x):
        return [run(x.sin(), part, reference, slot) for part in parts], [
            run(x, part, reference, slot) for part in parts
        ]

    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with torch.no_grad():
        want = [run(x, part, reference, None) for part in parts]
        run(x, parts[0], reference, slot)  # what a graph must not find
        for got, expected in zip(compiled(x)[1], want, strict=True):
            assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_what_is_not_quantized_is_not_kept(mode):
    """Its codes are x itself, under another name: kept, they would keep x."""
    (q, *_), slot = readers(), Slot()
    x = layers.random(5, 128, seed=9, dtype=torch.bfloat16)
    gone = weakref.ref(x)
    run(x, q, weight_only, slot)
    del x
    gc.collect()
    assert gone() is None


# ---- memory ----


@pytest.fixture
def kept(monkeypatch):
    """Weak references to all codes that were made."""
    made = []

    def quantize(*arguments):
        quantized = reference.quantize_int4(*arguments)
        made.append(weakref.ref(quantized[0]))
        return quantized

    ops = SimpleNamespace(quantize_int4=quantize, gemm_int4=reference.gemm_int4)
    return SimpleNamespace(ops=ops, alive=lambda: sum(codes() is not None for codes in made))


def test_codes_go_with_their_last_reader(kept, mode):
    x, slot, alive = layers.random(5, 128, seed=9, dtype=torch.bfloat16), Slot(), []
    for part in readers():
        run(x, part, kept.ops, slot)
        alive.append(kept.alive())
    assert alive == [1, 1, 0]


def test_codes_go_with_x(kept, mode):
    x, slot = layers.random(5, 128, seed=9, dtype=torch.bfloat16), Slot()
    run(x, readers()[0], kept.ops, slot)
    assert kept.alive() == 1
    del x
    assert kept.alive() == 0


def test_codes_go_when_another_input_comes(kept, mode):
    """Before that one's are made: a model holds one at most."""
    slot, alive = Slot(), []
    inputs = [layers.random(5, 128, seed=i, dtype=torch.bfloat16) for i in range(3)]

    def quantize(*arguments):
        alive.append(kept.alive())
        return kept.ops.quantize_int4(*arguments)

    ops = SimpleNamespace(quantize_int4=quantize, gemm_int4=reference.gemm_int4)
    for x in inputs:
        run(x, readers()[0], ops, slot)
    assert alive == [0, 0, 0] and kept.alive() == 1


def test_a_failed_quantization_leaves_nothing(x, mode):
    (q, k, _), slot = readers(), Slot()
    run(x, q, reference, slot)

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        slot.recall(x, q.reader, fail)
    ops = Counting()
    run(x, k, ops, slot)
    assert ops.quantized == 1


def test_threads_may_use_one_slot():
    parts, slot, wrong = readers(k=64), Slot(), []

    def work(seed):
        with torch.inference_mode():
            for i in range(50):
                x = layers.random(3, 64, seed=100 * seed + i, dtype=torch.bfloat16)
                for part in parts:
                    if not torch.equal(run(x, part, reference, slot), run(x, part, reference, None)):
                        wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and slot._held is None
