"""One quantization for linears that read the same input: q, k and v that a host keeps apart.

Linears with equal smoothing and an equal `down` make the same codes, scales and hidden values of the same x. Which
ones have them is found once, when a model is loaded, and said by `Reader`; nothing is guessed from tensors that happen
to look alike. What the first one makes waits in a `Slot` for the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# codes, scales, hidden, as an op set's quantizers return them
Quantized = tuple[Tensor, Tensor | None, Tensor]


@dataclass(frozen=True, eq=False)
class Input:
    """What several linears of a model quantize alike; another load of the same file has others.

    name      for people
    readers   how many linears read it
    """

    name: str
    readers: int


@dataclass(frozen=True)
class Reader:
    """One of the linears that quantize an input alike, by its number."""

    input: Input
    number: int


@dataclass(frozen=True, eq=False)
class _Held:
    """A quantized input, what it was made of, and the numbers of the readers that have not had it."""

    x: weakref.ref
    state: tuple
    input: Input
    waiting: frozenset[int]
    quantized: Quantized

    def is_for(self, x: Tensor, reader: Reader) -> bool:
        mine = self.x() is x and self.input is reader.input and reader.number in self.waiting
        return mine and self.state == _state(x)


class Slot:
    """The last input that linears of one model share, quantized by their op set, until all of them have had it.

    It is handed out for the very tensor object it was made of, with the same memory, shape and version, and to each
    reader once: one that comes again begins anew. It goes when the last reader has had it, when x dies, or when
    another input comes, so a model holds one at most.

    Inference mode counts no versions, and there the contract is: nobody writes into x between its first reader and its
    last. ComfyUI's attention and feed-forward classes call them one after the other. Layers with hooks, which come
    between, do not share (`QuantizedLinear`).

    Threads may use one slot: what it holds never changes and is swapped in one assignment.
    """

    def __init__(self) -> None:
        self._held: _Held | None = None

    def recall(self, x: Tensor, reader: Reader, make: Callable[[], Quantized]) -> Quantized:
        """What `make` returns for x, made by this reader or by one before it."""
        if not _may_share(x):
            return make()
        held, self._held = self._held, None
        if held is None or not held.is_for(x, reader):
            held = None  # its memory is free before more is asked for
            quantized = make()
            if quantized[1] is None:  # nothing was quantized, and the codes are x: kept, x would never die
                return quantized
            everyone = frozenset(range(reader.input.readers))
            held = _Held(weakref.ref(x, self._drop), _state(x), reader.input, everyone, quantized)
        waiting = held.waiting - {reader.number}
        self._held = replace(held, waiting=waiting) if waiting else None
        return held.quantized

    def forget(self) -> None:
        """Drop what is held."""
        self._held = None

    def _drop(self, x: weakref.ref) -> None:
        if self._held is not None and self._held.x is x:
            self._held = None


def _may_share(x: Tensor) -> bool:
    """Not where a graph is traced or captured, which would remember the slot, nor where gradients are wanted."""
    if torch.compiler.is_compiling() or x.requires_grad or type(x) is not Tensor:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _state(x: Tensor) -> tuple:
    """What changes when x is given other memory or is written to; its version only where one is counted."""
    version = None if x.is_inference() else x._version
    # on another stream the codes may not be there yet
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return x.data_ptr(), x.shape, x.stride(), x.dtype, version, stream
