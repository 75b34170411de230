"""One single block of FLUX's with 4-bit layers in parts, and what counts how its layers were computed."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy.ldm.flux.layers import SingleStreamBlock

from svdquant_nodes.svdquant.adapters import layout, single_block
from svdquant_nodes.svdquant.adapters.operations import make_operations
from svdquant_nodes.svdquant.core import tail
from svdquant_nodes.svdquant.core.linear import Part
from svdquant_nodes.svdquant.kernels import ops
from svdquant_nodes.tests import layers

HIDDEN, TOKENS = 128, 12


def fill(layer, *parts, dtype=torch.bfloat16, seed=0):
    """Give a host's linear quantized parts: format, rows, columns, first row, first column."""
    made, bias = [], layers.random(layer.out_features, seed=7, dtype=dtype)
    for i, (name, n, k, row, column) in enumerate(parts):
        weights = layers.random_linear(name, n, k, dtype=dtype, seed=10 * i + n + seed)
        made.append(Part(replace(weights, bias=None), row, column))
    layer.weight = torch.nn.Parameter(layout.pack(made, dtype), requires_grad=False)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)


def fill_first(layer, name="int4", **kind):
    fill(layer, ("int4", 3 * HIDDEN, HIDDEN, 0, 0), (name, 4 * HIDDEN, HIDDEN, 3 * HIDDEN, 0), **kind)


def fill_second(layer, name="int4-unsigned", **kind):
    fill(layer, ("int4", HIDDEN, HIDDEN, 0, 0), (name, HIDDEN, 4 * HIDDEN, 0, HIDDEN), **kind)


def make(dtype=torch.bfloat16, first="int4", second="int4-unsigned", installed=True, **options):
    """A model of one block of FLUX's."""
    layout.register()
    sizes = dict(dtype=dtype, device="cpu", operations=make_operations(ops))
    model = torch.nn.Module()
    model.block = SingleStreamBlock(HIDDEN, 2, **options, **sizes)
    fill_first(model.block.linear1, first, dtype=dtype)
    fill_second(model.block.linear2, second, dtype=dtype)
    small = [model.block.norm, model.block.modulation or torch.nn.Identity()]
    for i, module in enumerate([inner for part in small for inner in part.modules()]):
        for name, meta in module._parameters.items():
            values = layers.random(*meta.shape, seed=90 + i, dtype=dtype, scale=0.1)
            module._parameters[name] = torch.nn.Parameter(values + (meta.ndim == 1), requires_grad=False)
    if installed:
        assert single_block.install(model) == 1
    return model


def run(model, x=None, vec=None, dtype=torch.bfloat16, **options):
    x = layers.random(2, TOKENS, HIDDEN, seed=1, dtype=dtype) if x is None else x.clone()
    vec = layers.random(2, HIDDEN, seed=2, dtype=dtype) if vec is None else vec
    return model.block(x, vec, None, **options)


class Calls:
    """How many blocks were begun and finished together, and how often the MLP's share was computed after all."""

    def __init__(self, monkeypatch):
        self.begun = self.finished = self.read = 0
        for name, counter in (("begin", "begun"), ("finish", "finished"), ("rest", "read")):
            monkeypatch.setattr(tail, name, self.counting(getattr(tail, name), counter))

    def counting(self, real, counter):
        def count(*args):
            y = real(*args)
            setattr(self, counter, getattr(self, counter) + (y is not None))
            return y

        return count

    def __eq__(self, count):
        """Whether so many blocks went as planned, and no other was begun."""
        return (self.begun, self.finished, self.read) == (count, count, 0)

    def __repr__(self):
        return f"{self.begun} begun, {self.finished} finished, {self.read} read"
