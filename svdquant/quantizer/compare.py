"""How far the pictures of a quantized model are from those of its 16-bit original, drawn from the same noise.

These numbers measure divergence, not beauty: a good 4-bit model may place a leaf elsewhere. Look at the pictures too.
Images are [B, H, W, 3] in 0..1.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's, as its hub names it
GAIN = 4.0  # of the difference panel


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every picture: [B, H, W, 3] twice -> [B]; infinite where they are equal."""
    check_alike(images, reference)
    return -10 * torch.log10((images - reference).double().square().mean((1, 2, 3)))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of every picture, 1 where they are equal: [B, H, W, 3] twice -> [B].

    Gaussian window of 11 pixels, sigma 1.5, borders left out (Wang et al. 2004); the mean over the colours.
    """
    check_alike(images, reference)
    line = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2)).double()
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    a, b = (x.double().cpu().movedim(-1, 1).flatten(0, 1)[:, None] for x in (images, reference))
    mean_a, mean_b, aa, bb, ab = (F.conv2d(x, window) for x in (a, b, a * a, b * b, a * b))
    spread = aa - mean_a**2 + bb - mean_b**2 + C2
    likeness = (2 * mean_a * mean_b + C1) * (2 * (ab - mean_a * mean_b) + C2)
    likeness = likeness / ((mean_a**2 + mean_b**2 + C1) * spread)
    return likeness.mean((1, 2, 3)).reshape(len(images), -1).mean(1)


def lpips(images: Tensor, reference: Tensor) -> Tensor | None:
    """Learned perceptual distance of every picture, 0 where they are equal: [B, H, W, 3] twice -> [B].

    None unless the package `lpips` and AlexNet's weights are on this machine; neither is ever downloaded
    (Zhang et al. 2018).
    """
    check_alike(images, reference)
    if (
        importlib.util.find_spec("lpips") is None
        or not Path(torch.hub.get_dir(), "checkpoints", ALEXNET).is_file()
    ):
        return None
    from lpips import LPIPS

    a, b = (x.movedim(-1, 1).float() * 2 - 1 for x in (images, reference))
    return LPIPS(net="alex", verbose=False)(a, b).flatten()


def panel(images: Tensor, reference: Tensor) -> Tensor:
    """Reference, image and their difference around grey, four times enlarged, side by side: -> [B, H, 3W, 3]."""
    check_alike(images, reference)
    difference = ((images - reference) * GAIN / 2 + 0.5).clamp(0, 1)
    return torch.cat((reference, images, difference), dim=2)


def check_alike(images: Tensor, reference: Tensor) -> None:
    """Raise a ValueError unless both are batches of pictures of one size."""
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"comparison: expected two batches [B, H, W, 3] of one size, got {list(images.shape)} and "
            f"{list(reference.shape)}. Draw both with the same settings."
        )
