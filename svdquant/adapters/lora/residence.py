"""Where the branches of a layer are: with its weight.

What LoRAs add is kept in RAM, as the host keeps their files, and is never moved back there. What a layer computes with
are copies, which come and go with its weight:

    weight in VRAM                      copies beside it, made once, dropped when the layer is moved away
    weight in RAM, streamed each step   copies for that step, out of page-locked memory where the host locks memory too
    dynamic VRAM                        the host's weight stays in RAM and has an image in VRAM for as long as there is
                                        room: copies are kept for as long as that image is
    everything on the CPU               no copies
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.model_management
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...core.linear import Branch

CPU = torch.device("cpu")

Branches = tuple[Branch, ...]


class Copies:
    """What a function makes of tensors, made once a tensor and dropped with it; shared tensors stay shared."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make, self._made = make, WeakIdKeyDictionary()

    def __call__(self, tensor: Tensor) -> Tensor:
        copy = self._made.get(tensor)
        if copy is None:
            copy = self._make(tensor)
            if copy is not tensor:  # a key that is its own value would never be dropped
                self._made[tensor] = copy
        return copy


class Residence:
    """The branches of one layer: as they were made, and as the layer computes with them."""

    def __init__(self) -> None:
        self.own: Branches = ()
        self.beside: Branches = ()  # where the weight is
        self._weight = self._compute = CPU
        self._copies, self._image = Copies(stay), None

    def take(self, branches: Sequence[Branch], weight: torch.device, compute: torch.device) -> None:
        """Take new branches for a layer whose weight is on one device and whose products are on another."""
        self.own = tuple(branches)
        if (weight, compute) != (self._weight, self._compute):
            self._settle(weight, compute)
        self.beside = tuple(branch.map(self._copies) for branch in self.own)

    def move(self, weight: torch.device) -> None:
        """Follow the layer's weight to another device."""
        if weight != self._weight:
            self._settle(weight, self._compute)
            self.beside = tuple(branch.map(self._copies) for branch in self.own)

    def at(self, device: torch.device, *, image: bool) -> Branches:
        """The branches on the device of a product; `image` says that the weight, too, is kept there meanwhile."""
        if device == self._weight or not self.beside:
            return self.beside
        visit = self._image if image and self._image else Copies(sent(device))
        self._image = visit if image else None
        return tuple(branch.map(visit) for branch in self.beside)

    def clear(self) -> None:
        """Forget the branches and every copy."""
        self.own = self.beside = ()
        self._settle(self._weight, self._compute)

    def _settle(self, weight: torch.device, compute: torch.device) -> None:
        self._weight, self._compute = weight, compute
        self._copies, self._image = Copies(chosen(weight, compute, pinning())), None


def sent(device: torch.device) -> Callable[[Tensor], Tensor]:
    """What copies a branch for a product, without waiting where the host does so too."""
    non_blocking = comfy.model_management.device_supports_non_blocking(device)
    return lambda tensor: tensor.to(device, non_blocking=non_blocking)


def stay(tensor: Tensor) -> Tensor:
    return tensor


def chosen(weight: torch.device, compute: torch.device, pins: bool) -> Callable[[Tensor], Tensor]:
    """What to do with a branch in RAM when its layer's weight is on `weight` and its products are on `compute`."""
    if weight.type != "cpu":
        return lambda tensor: tensor.to(weight)
    return pinned if compute.type == "cuda" and pins else stay


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in page-locked memory, from where a copy to a GPU does not hold up the next kernel."""
    try:
        return tensor.pin_memory()
    except RuntimeError:  # the system grants no more of it
        return tensor


def pinning() -> bool:
    """Whether the host locks memory, and has room left in what it allows itself."""
    manager = comfy.model_management
    return getattr(manager, "TOTAL_PINNED_MEMORY", 0) < getattr(manager, "MAX_PINNED_MEMORY", 0)
