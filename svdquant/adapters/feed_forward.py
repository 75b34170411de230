"""A GELU between two quantized layers, computed with them, in the host's module that holds all three.

What takes a module's place is another object of a subclass of its class, with the very same children, hooks and
attributes: names in state dicts, LoRAs, indexing and `isinstance` are as before. It computes through a fused op
while all it knows is as it was at load, and leaves the rest to the module's own forward: branches that are no rank,
weights that are streamed for each step, weight functions, hooks, replaced children, and torch.compile.

It is put there once, when the model is built, and is no object patch of a patcher: the host takes patches back in the
order in which it made them, so one inside a block that another node patches as a whole would be put back into the
wrong block, or, in older hosts, stop it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..core import linear as core
from ..kernels.select import FUSED_OPS
from .layout import Entry
from .operations import QuantizedLinear, lent_together


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


def install(model: nn.Module, fused: Collection[str] = FUSED_OPS) -> int:
    """Put what computes together in the place of every feed-forward that can be computed so; returns how many.

    fused   the ops that are worth it
    """
    found = list(_feed_forwards(model, fused))
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, together(module))
    return len(found)


def _feed_forwards(model: nn.Module, fused: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        build = _build(module)
        if build is not None and _consists_of(module, build) and Known(module, build).op in fused:
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

    @property
    def op(self) -> str | None:
        """The fused op of two layers of one part each around one GELU by tanh, None for anything else."""
        active = [part for part in self.rest if not _does_nothing(part)]
        stored = entries(self.first), entries(self.second)
        whole = len(active) == 1 and is_gelu(active[0]) and all(len(parts) == 1 for parts in stored)
        return core.fused_op(*(parts[0].spec for parts in stored)) if whole else None

    def unchanged(self, module: nn.Module) -> bool:
        """Whether the parts are still there, and nobody looks at or wraps what passes between them."""
        return untouched(module, self.parts)


def untouched(module: nn.Module, parts: Iterable[tuple[str, nn.Module]]) -> bool:
    """Whether these are still parts of a module, under these paths, without hooks or another forward."""
    return all(module.get_submodule(path) is part and not _is_watched(part) for path, part in parts)


def _is_watched(part: nn.Module) -> bool:
    hooks = part._forward_hooks or part._forward_pre_hooks
    return bool(hooks or part._compiled_call_impl or "forward" in part.__dict__)


def is_gelu(module: nn.Module) -> bool:
    """Whether it is the GELU by tanh."""
    return getattr(module, "approximate", "") == "tanh"


def entries(layer: nn.Module) -> Sequence[Entry]:
    """What the parts of a quantized layer are; none of any other."""
    quantized = isinstance(layer, QuantizedLinear) and layer.quantized
    return layer.weight._params.entries if quantized else ()


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.p)


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
    with lent_together(first, second, x.device) as layers:
        return None if layers is None else core.forward_pair(x, *layers, first.op_set)
