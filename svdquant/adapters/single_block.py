"""FLUX's single blocks: linear1's MLP part, GELU and linear2's MLP part in one op, between the host's own lines.

Such a block runs linear1, splits what it gives into qkv and the MLP's share, attends, puts GELU of that share behind
attention's output, and runs linear2. There the forward stays the host's, since a copy of it would silently lag behind
the next ComfyUI: it patches attention, modulates by regions, replaces blocks. Two layers cooperate around it:

  linear1   computes qkv; the rest of its output is a `Deferred` that holds linear1's quantized input
  the host  splits, applies GELU and concatenates, which only notes what is to be done; see core/deferred.py
  linear2   finds in its input what linear1 left to it, and finishes both (core/tail.py)

Nothing has to go as expected. Whatever else reads the MLP's share, now or in a host of tomorrow, is given its numbers,
computed then; a linear2 that cannot finish reads its input like anyone. All that passes between the layers is in the
tensors that the host passes, so that exceptions, threads and blocks within blocks need no thought. The MLP's share is
not in memory during attention, where as a rule it lies beside qkv.

linear1 begins this way only where all would go well, as far as it can know: both layers have 4-bit weights in memory of
their own and no branches but rank, block and children are as they were at load, without hooks, and nothing is compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core import tail
from ..core.deferred import AVAILABLE, Columns, Deferred, Gelu, beside
from ..core.linear import Branch, fused_op
from ..core.sharing import Quantized
from ..kernels.select import FUSED_OPS
from .feed_forward import entries, is_gelu, untouched
from .layout import Entry
from .operations import QuantizedLinear, lent_together

BLOCKS = ("comfy.ldm.flux.layers.SingleStreamBlock",)  # of FLUX.1 and Chroma


def install(model: nn.Module, fused: Collection[str] = FUSED_OPS) -> int:
    """Let the two layers of every single block that allows it cooperate; returns how many blocks.

    fused   the ops that are worth it
    """
    blocks = [module for module in model.modules() if AVAILABLE and _op(module) in fused]
    for block in blocks:
        known = block.linear1, block.mlp_act, block.linear2
        stored = entries(block.linear1), entries(block.linear2)
        block.linear1.together = Begin(weakref.ref(block), type(block).forward, known[1:], stored)
        block.linear2.together = finish
    return len(blocks)


def _op(block: nn.Module) -> str | None:
    """The fused op of the last parts of both layers with a GELU between, None if there is none."""
    cls = type(block)
    if f"{cls.__module__}.{cls.__qualname__}" not in BLOCKS or not is_gelu(block.mlp_act):
        return None
    first, second = block.linear1, block.linear2
    one, two = entries(first), entries(second)
    if min(len(one), len(two)) < 2 or any(part.column for part in one) or any(part.row for part in two):
        return None
    alike = first.out_features - one[-1].row == second.in_features - two[-1].column
    return fused_op(one[-1].spec, two[-1].spec) if alike else None


@dataclass(frozen=True, eq=False)
class Begin:
    """Linear1's side: what the block was at load. It is held weakly, as the host frees models by reference count.

    block     the block
    forward   of its class
    others    mlp_act and linear2
    stored    what the parts of linear1 and of linear2 are
    """

    block: Callable[[], nn.Module | None]
    forward: Callable
    others: tuple[nn.Module, QuantizedLinear]
    stored: tuple[Sequence[Entry], Sequence[Entry]]

    def __call__(self, layer: QuantizedLinear, x: Tensor) -> Tensor | None:
        """Linear1's output with its last rows deferred; None leaves the layer to itself."""
        if not (_is_plain(x) and self._as_loaded(layer) and _alone(x.device, layer, self.others[1])):
            return None
        begun = None
        with layer.lent(x.device) as held:
            if held is not None and layer.alone(x.device):  # lending may have found no room for it
                begun = tail.begin(x, held, layer.op_set, layer.shared_slot())
        if begun is None:
            return None
        y, quantized = begun
        left = Left(layer, held[1], quantized, x.shape[:-1], x.dtype, self.stored[1])
        return beside(y, Deferred(left, (*x.shape[:-1], layer.out_features - y.shape[-1]), y))

    def _as_loaded(self, layer: QuantizedLinear) -> bool:
        block = self.block()
        if block is None or "forward" in block.__dict__ or type(block).forward is not self.forward:
            return False
        parts = zip(("linear1", "mlp_act", "linear2"), (layer, *self.others), strict=True)
        layers = zip((layer, self.others[1]), self.stored, strict=True)
        return untouched(block, parts) and all(entries(one) == stored for one, stored in layers)


def _alone(device: torch.device, *layers: QuantizedLinear) -> bool:
    return all(layer.alone(device) for layer in layers)


def _is_plain(x: Tensor) -> bool:
    """In inference mode, as the host samples: autograd would look into what waits. Not where a graph is traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(x) is Tensor and torch.is_inference_mode_enabled()


@dataclass(frozen=True, eq=False)
class Left:
    """What linear1 has not computed: the last part's rows, of an input that is quantized already.

    branches   linear1's at that time, which are in `quantized` too
    shape      of x without its columns
    following  what linear2's parts are, which may have been replaced by then
    """

    layer: QuantizedLinear
    branches: Sequence[Branch]
    quantized: Quantized
    shape: Sequence[int]
    dtype: torch.dtype
    following: Sequence[Entry]

    def make(self) -> Tensor:
        """Those rows, computed by themselves."""
        device = self.quantized[0].device
        with self.layer.lent(device) as held:
            if held is None:
                raise RuntimeError(f"a 4-bit layer lost its weight on {device} while its output was waiting.")
            y = tail.rest(self.quantized, (held[0], self.branches), self.layer.op_set, self.dtype)
        return y.reshape(*self.shape, y.shape[-1])


def finish(layer: QuantizedLinear, x: Tensor) -> Tensor | None:
    """Linear2's side: its output, if it is given attention's output beside GELU of what linear1 left; else None."""
    if torch.compiler.is_compiling() or not isinstance(x, Deferred):
        return None
    columns, stored = x.waiting, entries(layer)
    left = _left(columns.tail) if isinstance(columns, Columns) else None
    if left is None or left.following != stored or columns.head.shape[-1] != stored[-1].column:
        return None
    with lent_together(left.layer, layer, x.device) as layers:
        if layers is None:
            return None
        first, second = layers
        return tail.finish(columns.head, left.quantized, (first[0], left.branches), second, layer.op_set)


def _left(waiting: Deferred) -> Left | None:
    """What waits for its GELU, if nobody has read any of it."""
    activated = waiting.waiting
    left = activated.of.waiting if isinstance(activated, Gelu) else None
    return left if isinstance(left, Left) else None
