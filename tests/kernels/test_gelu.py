"""The op from one layer's product to the next layer's activations, where no kernel does it all, and where one may."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdquant_nodes.svdquant.core import linear, reference
from svdquant_nodes.svdquant.kernels import ops, select
from svdquant_nodes.tests import layers

pytestmark = pytest.mark.usefixtures("kernels")


def neighbours(dtype=torch.bfloat16, following="int4-unsigned"):
    """Activations and two layers, the second of which reads what a GELU makes of the first one's output."""
    second = layers.random_linear(following, 40, 192, 8, dtype=dtype, seed=5)
    x, first = (
        layers.random(5, 128, seed=3, dtype=dtype),
        layers.random_linear("int4", 192, 128, 8, dtype=dtype),
    )
    return x, first, second


@pytest.mark.parametrize("wanted", ["auto", "off", "weight_only"])
@pytest.mark.parametrize("following", ["int4", "int4-unsigned"])
def test_apart_a_gelu_changes_no_bit(wanted, following):
    """Where no kernel does it all, the op is its parts, whatever computes them."""
    x, first, second = neighbours(following=following)
    op_set = ops.OpSet(wanted)
    between = torch.nn.functional.gelu(linear.linear(x, first, op_set, dtype=x.dtype), approximate="tanh")
    want = linear.linear(between, second, op_set, dtype=x.dtype)
    assert torch.equal(linear.feed_forward(x, first, second, op_set, dtype=x.dtype), want)


@pytest.mark.parametrize("following", ["int4", "int4-unsigned"])
@pytest.mark.parametrize("m", [0, 5], ids="m={}".format)
def test_what_compile_sees_of_a_gelu(following, m):
    x, w, then = neighbours(following=following)
    made = reference.quantize_int4(x[:m], w.smooth, w.down)
    want = reference.gemm_int4_gelu(*made, w, then, dtype=x.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = torch.ops.svdquant.gemm_int4_gelu(
            *(*made, w.codes, w.scales, w.up, w.bias, then.smooth, then.down),
            *(then.spec.act_shift, x.dtype, "gelu_s4"),
        )
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want]


FUSABLE = {  # how a pair is changed, the op that is asked for a spelling
    "as-published": (lambda w, then: (w, then), "gemm_int4_gelu"),
    "of-two-dtypes": (lambda w, then: (w, replace(then, down=then.down.float())), "gemm_int4"),
    "groups-of-128": (
        lambda w, then: (
            replace(w, spec=replace(w.spec, group=128), scales=w.scales[:, ::2]),
            then,
        ),
        "quantize_int4_unsigned",
    ),
}


@pytest.mark.parametrize(("change", "op"), FUSABLE.values(), ids=FUSABLE)
def test_what_may_be_fused(monkeypatch, change, op):
    x, *pair = neighbours()
    w, then = change(*pair)
    made = (*ops.quantize_int4(x, pair[0].smooth, pair[0].down),)
    asked = []
    op_set = ops.OpSet()
    monkeypatch.setattr(op_set, "_choose", lambda op, *_: asked.append(op) or select.REFERENCE)
    monkeypatch.setattr(torch.ops.svdquant, "gemm_int4_gelu", lambda *_: asked.append("fused"))
    op_set.gemm_int4_gelu(*made, w, then, dtype=x.dtype)
    assert asked[:1] == [op]
