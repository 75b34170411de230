"""What an op in Python hands to a kernel: checks, each with a sentence, and addresses with strides."""

from __future__ import annotations

import torch
from torch import Tensor

from .structs import DTYPES, Floats, Output

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


# ---- checks: a sentence is made only where one is needed, as every layer of every step passes here ----


def check_shape(t: Tensor, name: str, *expected: int) -> None:
    if t.shape != expected:
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(t.shape)}")


def check_devices(first: Tensor, **others: Tensor | None) -> None:
    here = first.device
    for name, t in others.items():
        if t is not None and t.device != here:
            raise ValueError(f"{name}: expected on {here} as the rest, got {t.device}")


def check_types(expected: torch.dtype, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype != expected:
            raise ValueError(f"{name}: expected {name_of(expected)}, got {name_of(t.dtype)}")


def check_matrix(t: Tensor, name: str, axes: str) -> None:
    if t.ndim != 2:
        raise ValueError(f"{name}: expected {axes}, got {list(t.shape)}")


def check_packed(t: Tensor) -> None:
    if t.ndim != 2 or t.dtype != torch.uint8:
        got = f"{name_of(t.dtype)} {list(t.shape)}"
        raise ValueError(f"weight_codes: expected packed uint8 [N, K/2], got {got}")


def check_columns(k: int) -> None:
    if not k:
        raise ValueError("weight_codes: expected columns, got none")


def check_branch(hidden: Tensor, up: Tensor, bias: Tensor | None, m: int, n: int) -> None:
    r = up.shape[-1]
    check_shape(hidden, "hidden", m, r)
    check_shape(up, "up", n, r)
    if bias is not None:
        check_shape(bias, "bias", n)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number_of(dtype: torch.dtype, name: str) -> int:
    """A dtype as a kernel knows it."""
    number = DTYPES.get(dtype)
    if number is None:
        raise ValueError(f"{name}: expected a float of 32, 16 or 8 bits, got {name_of(dtype)}")
    return number


# ---- what a kernel is given ----


class Kept(list):
    """Tensors that must live until their kernel is queued, made as it reads them."""

    def matrix(self, t: Tensor, name: str) -> Floats:
        """Rows may lie apart, but not the numbers in a row."""
        t = _narrowed(t)
        t = t if t.stride(1) == 1 else t.contiguous()
        self.append(t)
        return Floats(t.data_ptr(), number_of(t.dtype, name), t.stride(0))

    def by_group(self, t: Tensor, name: str) -> Floats:
        """Scales as carrier.py says; stride: from one group's to the next group's."""
        if t.dtype != torch.float32 or t.stride(0) != 1 or t.stride(1) % 4 or t.data_ptr() % 16:
            expected = "fp32 with a group's side by side from a multiple of 16 bytes on"
            got = f"{name_of(t.dtype)} of strides {list(t.stride())}"
            raise ValueError(f"{name}: expected {expected}, got {got}")
        self.append(t)
        return Floats(t.data_ptr(), DTYPES[t.dtype], t.stride(1))

    def vector(self, t: Tensor | None, name: str) -> Floats:
        """Nothing for None."""
        if t is None:
            return Floats()
        t = _narrowed(t).contiguous()
        self.append(t)
        return Floats(t.data_ptr(), number_of(t.dtype, name), 1)

    def factor(self, t: Tensor | None, n: int) -> Floats:
        """An NVFP4 weight's second scale: one number, or one a row."""
        if t is None:
            return Floats()
        if t.numel() not in (1, n):
            raise ValueError(f"second_scale: expected 1 or {n} numbers, got {t.numel()}")
        floats = self.vector(t, "second_scale")
        floats.stride = 0 if t.numel() == 1 else 1
        return floats

    def addend(self, t: Tensor | None, m: int, n: int) -> Floats:
        """What joins last, in fp32; nothing for None."""
        if t is None:
            return Floats()
        check_types(torch.float32, addend=t)
        check_shape(t, "addend", m, n)
        return self.matrix(t, "addend")

    def scratch(self, like: Tensor, size: int) -> int:
        """The address of so many bytes, which the allocator gives to later calls in the order of the stream."""
        self.append(like.new_empty(size, dtype=torch.uint8))
        return self[-1].data_ptr()

    def whole(self, t: Tensor) -> int:
        """The address of a contiguous tensor."""
        self.append(t.contiguous())
        return self[-1].data_ptr()


def _narrowed(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.float64 else t


def output(out: Tensor, m: int, n: int) -> Output:
    """Rows may lie apart, but neither the numbers in a row nor the rows over each other."""
    if out.dtype not in OUTPUTS:
        raise ValueError(f"out: expected fp32, bf16 or fp16, got {name_of(out.dtype)}")
    check_shape(out, "out", m, n)
    row, number = out.stride()
    if (n > 1 and number != 1) or (m > 1 and row < n):
        strides = f"got strides {[row, number]}"
        raise ValueError(f"out: expected rows of neighbouring numbers, none over another, {strides}")
    return Output(out.data_ptr(), DTYPES[out.dtype], row)
