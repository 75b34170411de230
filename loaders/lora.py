"""A LoRA file as tensors: safetensors only, checked before anything of it is used."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .tensorfile import HOST_PREFIX, open_file

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def read_lora(path: Path) -> dict[str, Tensor]:
    """Every tensor of a LoRA file by its own name, memory-mapped; fp8 ones as bf16.

    Raises ValueError for a pickle, an empty file, a whole model, or a tensor that holds NaN or infinity.
    """
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path.name}: expected .safetensors, got a pickle, which can run code. Get the .safetensors version."
        )
    file = open_file(path)
    if not file:
        raise ValueError(f"{path.name}: expected LoRA tensors, got an empty file. Download it again.")
    if any(name.endswith(".qweight") for name in file):
        raise ValueError(
            f"{path.name}: expected a LoRA, got a quantized model. Load it with SVDQuant Load Model."
        )
    tensors = {name.removeprefix(HOST_PREFIX): _checked(path, name, file[name]) for name in file}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() or _counts(name)}


def _counts(name: str) -> bool:
    """Some trainers keep alpha, and the shape of a widened layer, as whole numbers."""
    return name.endswith((".alpha", ".reshape_weight"))


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        if tensor.numel() > 2 and tensor.ndim > 1:
            raise ValueError(
                f"{path.name}: {name}: expected floating-point numbers, got {str(tensor.dtype).split('.')[1]}. "
                "A quantized LoRA cannot be read; get the 16-bit version."
            )
        return tensor
    tensor = tensor.to(torch.bfloat16) if tensor.dtype.itemsize == 1 else tensor  # fp8 has no arithmetic
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{path.name}: {name}: expected finite numbers, got NaN or infinity. Get another copy."
        )
    return tensor
