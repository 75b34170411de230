"""Where to work something out once, while a model is loaded or made."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def able(device: torch.device) -> torch.device:
    """The device, or the CPU for one whose torch may lack fp64, fp8 or matrix factorizations (MPS, XPU, DirectML)."""
    return device if device.type == "cuda" else CPU
