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
    first = layers.random_linear(following.removesuffix("-unsigned"), 192, 128, 8, dtype=dtype)
    return layers.random(5, 128, seed=3, dtype=dtype), first, second


FOLLOWING = pytest.mark.parametrize("following", ["int4", "int4-unsigned", "nvfp4"])


@pytest.mark.parametrize("wanted", ["auto", "off", "weight_only"])
@FOLLOWING
def test_apart_a_gelu_changes_no_bit(wanted, following):
    """Where no kernel does it all, the op is its parts, whatever computes them."""
    x, first, second = neighbours(following=following)
    op_set = ops.OpSet(wanted)
    between = torch.nn.functional.gelu(linear.linear(x, first, op_set, dtype=x.dtype), approximate="tanh")
    want = linear.linear(between, second, op_set, dtype=x.dtype)
    assert torch.equal(linear.feed_forward(x, first, second, op_set, dtype=x.dtype), want)


@FOLLOWING
@pytest.mark.parametrize("m", [0, 5], ids="m={}".format)
def test_what_compile_sees_of_a_gelu(following, m):
    x, w, then = neighbours(following=following)
    made, op = linear.quantize(x[:m], w, reference), linear.fused_op(w.spec, then.spec)
    want = getattr(reference, op)(*made, w, then, dtype=x.dtype)
    second, shift = ((w.second_scale,), ()) if following == "nvfp4" else ((), (then.spec.act_shift,))
    layer = w.codes, w.scales, *second, w.up, w.bias
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = getattr(torch.ops.svdquant, op)(
            *(*made, *layer, then.smooth, then.down, *shift, x.dtype, "gelu")
        )
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want]


def wider(w):
    """With twice as many columns a scale."""
    return replace(w, spec=replace(w.spec, group=2 * w.spec.group), scales=w.scales[:, ::2])


def fewer(w, n):
    return replace(w, **{name: getattr(w, name)[:n].clone() for name in ("codes", "scales", "up", "bias")})


def reading(then, k):
    short = dict(codes=then.codes[:, : k // 2], scales=then.scales[:, : k // then.spec.group])
    return replace(then, **short, smooth=then.smooth[:k], down=then.down[:, :k])


FUSABLE = {  # format of what follows, how a pair is changed, the op that is asked for a spelling
    "as-published": ("int4-unsigned", lambda w, then: (w, then), "gemm_int4_gelu"),
    "nvfp4": ("nvfp4", lambda w, then: (w, then), "gemm_nvfp4_gelu"),
    "of-two-dtypes": (
        "int4-unsigned",
        lambda w, then: (w, replace(then, down=then.down.float())),
        "gemm_int4",
    ),
    "nvfp4-of-two-dtypes": (
        "nvfp4",
        lambda w, then: (w, replace(then, down=then.down.float())),
        "gemm_nvfp4",
    ),
    "groups-of-128": ("int4-unsigned", lambda w, then: (wider(w), then), "quantize_int4_unsigned"),
    "nvfp4-in-part-of-a-tile": (
        "nvfp4",
        lambda w, then: (fewer(w, 176), reading(then, 176)),
        "gemm_nvfp4",
    ),
}


@pytest.mark.parametrize(("following", "change", "op"), FUSABLE.values(), ids=FUSABLE)
def test_what_may_be_fused(monkeypatch, following, change, op):
    x, *pair = neighbours(following=following)
    (w, then), fused = change(*pair), linear.fused_op(pair[0].spec, pair[1].spec)
    made, asked, op_set = linear.quantize(x, pair[0], ops), [], ops.OpSet()
    monkeypatch.setattr(op_set, "_choose", lambda op, *_: asked.append(op) or select.REFERENCE)
    monkeypatch.setattr(torch.ops.svdquant, fused, lambda *_: asked.append("fused"))
    getattr(op_set, fused)(*made, w, then, dtype=x.dtype)
    assert asked[:1] == [op]
