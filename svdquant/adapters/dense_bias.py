"""The host's functions of a bias, on layers whose stored bias is not that of the dense layer.

Where activations are shifted, files keep the bias with the shift taken out. Adding to it is the same either way, but a
merge scales it, or puts another in its place, and means the dense layer's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor

Function = Callable[[Tensor], Tensor]


class OfDense:
    """A function of the dense layer's bias as one of the stored bias; for the rest, the host's own object."""

    def __init__(self, layer, function: Function) -> None:
        self._layer, self._function = weakref.ref(layer), function  # the layer holds this
        self._more: Tensor | None = (
            None  # what the dense layer's bias has more: the whole weight is read for it
        )

    def __call__(self, bias: Tensor) -> Tensor:
        if self._more is None or self._more.device != bias.device:
            self._more = self._layer().compensation(bias.float())
        return (self._function(bias.float() + self._more) - self._more).to(bias.dtype)

    def __getattr__(self, name: str):
        if name in ("_layer", "_function", "_more"):  # asked for before they are there, while this is copied
            raise AttributeError(name)
        return getattr(self._function, name)


class Functions(list):
    """A layer's list of such functions, to which the host adds its own."""

    def __init__(self, layer, functions: Iterable[Function]) -> None:
        super().__init__()
        self._layer = weakref.ref(layer)
        self.extend(functions)

    def append(self, function: Function) -> None:
        super().append(OfDense(self._layer(), function))

    def extend(self, functions: Iterable[Function]) -> None:
        for function in functions:
            self.append(function)
