"""A LoRA file as tensors: safetensors only, checked before anything of it is used."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .tensorfile import HOST_PREFIX, open_file

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def read_lora(path: Path) -> dict[str, Tensor]:
    """Every tensor of a LoRA file by its own name, memory-mapped; fp8 ones as bf16.

    Raises ValueError for a pickle, an empty file, or a tensor that holds NaN or infinity.
    """
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path.name}: expected .safetensors, got a pickle, which can run code. Get the .safetensors version."
        )
    file = open_file(path)
    if not file:
        raise ValueError(f"{path.name}: expected LoRA tensors, got an empty file. Download it again.")
    tensors = {name.removeprefix(HOST_PREFIX): _widen(file[name]) for name in file}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path.name}: {name}: expected finite numbers, got NaN or infinity. Get another copy."
            )
    return tensors


def _widen(tensor: Tensor) -> Tensor:
    """fp8 has no arithmetic of its own."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor
