"""A tensor that is computed when somebody reads it, and perhaps never.

Between two layers of a host's stands code of the host's: a split, a GELU, a concatenation. The first layer returns a
`Deferred`, those three hand it on, and the second layer, which is given what they made of it, may compute all of it at
once. Whatever else is done with one, by whatever operation of torch's, is done with the numbers that it stands for. So
nothing need be known of the code between: what is left out is what nobody has read.

All state is in the tensors: no plan that an exception could leave behind or another thread could meet.

What waits is computed later than it would be. So nobody may write into a tensor after it was split or handed on, before
the second layer has it. For a `Deferred` this is checked; for what is put beside one it is a contract. They are made in
inference mode alone: elsewhere autograd keeps books on views, which a split is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu
from torch.utils._pytree import tree_map

# Without it a library that takes addresses would be given 0.
_refuse_addresses = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)
AVAILABLE = _refuse_addresses is not None


class Recipe(Protocol):
    """How to compute a tensor."""

    def make(self) -> Tensor: ...


class Deferred(Tensor):
    """What a recipe makes: computed when it is first read, and kept from then on.

    Raises RuntimeError where something writes into it while others wait for what it was.
    """

    recipe: Recipe
    made: Tensor | None
    is_split: bool  # into columns of their own
    is_awaited: bool  # by tensors that will be computed of it

    @staticmethod
    def __new__(cls, recipe: Recipe, shape: Sequence[int], like: Tensor) -> Deferred:
        """Of this shape, with dtype and device of `like`."""
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, recipe: Recipe, shape: Sequence[int], like: Tensor) -> None:
        self.recipe, self.made = recipe, None
        self.is_split = self.is_awaited = False
        _refuse_addresses(self)

    @property
    def waiting(self) -> Recipe | None:
        """The recipe, for those who can do without the tensor; None once somebody has read it."""
        return self.recipe if self.made is None else None

    def read(self) -> Tensor:
        """The tensor. One that was split is put together anew each time, of what its columns are by then."""
        if self.is_split:
            return self.recipe.make()
        if self.made is None:
            self.made = self.recipe.make()
        return self.made

    def data_ptr(self) -> int:
        """The address of the tensor, for kernels in other languages."""
        return self.read().data_ptr()

    __torch_function__ = (
        torch._C._disabled_torch_function_impl
    )  # one door is enough: all goes through the next

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _HANDED_ON.get(func)
        handed_on = rule(*args, **kwargs) if rule else None
        if handed_on is not None:
            return handed_on
        if func._schema.is_mutable:
            _check_written(func, args, kwargs)
        return func(*tree_map(_read, args), **tree_map(_read, kwargs))


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Deferred) else value


def _check_written(func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    for value in _written(func, args, kwargs):
        if isinstance(value, Deferred) and (value.is_split or value.is_awaited):
            raise RuntimeError(
                f"a layer's output {list(value.shape)} is written to by {func} after it was handed on and before "
                "it was computed. Please report the node that does so; with SVDQUANT_KERNELS=off it runs."
            )


def _written(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[i] if i < len(args) else kwargs.get(argument.name)


# ---- what hands it on ----


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns that there are, and behind them some that wait."""

    head: Tensor
    tail: Deferred

    @property
    def sizes(self) -> list[int]:
        return [self.head.shape[-1], self.tail.shape[-1]]

    def make(self) -> Tensor:
        return torch.cat((self.head, self.tail.read()), dim=-1)


@dataclass(frozen=True, eq=False)
class Gelu:
    """GELU, by tanh, of what waits."""

    of: Deferred

    def make(self) -> Tensor:
        return gelu(self.of.read(), approximate="tanh")


def beside(head: Tensor, tail: Deferred) -> Deferred:
    """Columns [..., A] and, behind them, some [..., B] that wait."""
    return Deferred(Columns(head, tail), (*head.shape[:-1], head.shape[-1] + tail.shape[-1]), head)


def _split(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor] | None:
    columns = x.waiting
    if not (isinstance(columns, Columns) and _is_last(dim, x) and list(sizes) == columns.sizes):
        return None
    x.is_split = True
    return [columns.head, columns.tail]


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor | None:
    if x.waiting is None or approximate != "tanh":
        return None
    x.is_awaited = True
    return Deferred(Gelu(x), x.shape, x)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    if len(tensors) != 2 or type(tensors[0]) is not Tensor or not isinstance(tensors[1], Deferred):
        return None
    head, tail = tensors
    alike = head.dtype == tail.dtype and head.device == tail.device and head.shape[:-1] == tail.shape[:-1]
    if not (alike and tail.waiting is not None and _is_last(dim, tail)):
        return None
    tail.is_awaited = True
    return beside(head, tail)


def _is_last(dim: int, x: Tensor) -> bool:
    return dim in (-1, x.ndim - 1)


_HANDED_ON: dict[Callable, Callable[..., Any]] = {
    torch.ops.aten.split_with_sizes.default: _split,
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.cat.default: _cat,
}
