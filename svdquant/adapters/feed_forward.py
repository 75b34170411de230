"""A GELU between two quantized layers, computed with them, in the host's module that holds all three.

What takes a module's place is another object of a subclass of its class, with the very same children, hooks and
attributes: names in state dicts, LoRAs, indexing and `isinstance` are as before. It computes through `gemm_int4_gelu`
while all it knows is as it was at load, and leaves the rest to the module's own forward: branches that are no rank,
weights that are streamed for each step, weight functions, hooks, replaced children, and torch.compile.

It is put there once, when the model is built, and is no object patch of a patcher: the host takes patches back in the
order in which it made them, so one inside a block that another node patches as a whole would be put back into the
wrong block, or, in older hosts, stop it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..core import linear as core
from .operations import QuantizedLinear


@dataclass(frozen=True)
class Build:
    """How a class of the host's is built: two linears, and the rest, which is a GELU and what does nothing."""

    first: str
    second: str
    rest: tuple[str, ...]


# FLUX, Chroma, Wan | PixArt, SD 3 | Qwen-Image
BUILDS = {
    "torch.nn.modules.container.Sequential": Build("0", "2", ("1",)),
    "comfy.ldm.modules.diffusionmodules.mmdit.Mlp": Build("fc1", "fc2", ("act", "drop1", "norm", "drop2")),
    "comfy.ldm.qwen_image.model.FeedForward": Build("net.0.proj", "net.2", ("net.0", "net.1")),
}


def install(model: nn.Module) -> int:
    """Put what computes together in the place of every feed-forward that can be computed so; returns how many."""
    found = list(_feed_forwards(model))
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, together(module))
    return len(found)


def _feed_forwards(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        build = _build(module)
        if build is not None and _consists_of(module, build) and Known(module, build).fits():
            yield name, module


def _build(module: nn.Module) -> Build | None:
    cls = type(module)
    return BUILDS.get(f"{cls.__module__}.{cls.__qualname__}")


def _consists_of(module: nn.Module, build: Build) -> bool:
    """Whether there is all of it and no more; what only holds others does not count."""
    found = {path for path, part in module.named_modules() if path and not isinstance(part, nn.ModuleList)}
    return found == {build.first, build.second, *build.rest}


class Known:
    """What a feed-forward is made of, as it was found."""

    def __init__(self, module: nn.Module, build: Build) -> None:
        paths = (build.first, build.second, *build.rest)
        self.parts = tuple((path, module.get_submodule(path)) for path in paths)
        self.first, self.second, *self.rest = (part for _, part in self.parts)

    def fits(self) -> bool:
        """Whether two layers of 4-bit integers stand around one GELU by tanh."""
        active = [part for part in self.rest if not _does_nothing(part)]
        gelu = len(active) == 1 and getattr(active[0], "approximate", "") == "tanh"
        return gelu and _is_int4(self.first, may_shift=False) and _is_int4(self.second, may_shift=True)

    def unchanged(self, module: nn.Module) -> bool:
        """Whether the parts are still there, and nobody looks at or wraps what passes between them."""
        return all(
            module.get_submodule(path) is part
            and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
            for path, part in self.parts
        )


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.p)


def _is_int4(layer: nn.Module, may_shift: bool) -> bool:
    """Whether it is a quantized layer of one part in 4-bit integers, with shifted activations only if it may."""
    if not (isinstance(layer, QuantizedLinear) and layer.quantized):
        return False
    specs = [entry.spec for entry in layer.weight._params.entries]
    return len(specs) == 1 and specs[0].format == "int4" and (may_shift or not specs[0].act_shift)


class Together:
    """Put before a module's class: its forward, or both layers and the GELU at once."""

    known: Known

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = None
        if not (args or kwargs or torch.compiler.is_compiling()) and self.known.unchanged(self):
            y = compute(x, self.known.first, self.known.second)
        return super().forward(x, *args, **kwargs) if y is None else y


def together(module: nn.Module) -> nn.Module:
    """What computes as a module does, together where that is possible; it shares all that the module has."""
    same = object.__new__(_class_of(type(module)))
    same.__dict__.update(module.__dict__, known=Known(module, _build(module)))
    return same


@cache
def _class_of(cls: type) -> type:
    return type(cls.__name__, (Together, cls), {"__module__": __name__})


def compute(x: Tensor, first: QuantizedLinear, second: QuantizedLinear) -> Tensor | None:
    """Both layers with the GELU between, None where that takes their own forwards."""
    layers = first, second
    if not all(layer.alone(x.device) for layer in layers):
        return None
    with first.lent(x.device) as one, second.lent(x.device) as two:
        if one is None or two is None or not all(layer.alone(x.device) for layer in layers):
            return None
        return core.forward_pair(x, one, two, first.op_set)
