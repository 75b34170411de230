"""Smoothing: move activation outliers into the weight, channel by channel.

Activations are divided by `smooth`, weight columns were multiplied by it: (x / s) @ (W * s).T = x @ W.T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_act(x: Tensor, smooth: Tensor) -> Tensor:
    """x / smooth: one fp32 division, one rounding to x's dtype.

    x        [M, K]   fp32 | bf16 | fp16
    smooth   [K]      any float
    returns  [M, K]   as x
    """
    return (x.float() / smooth.float()).to(x.dtype)


def smooth_weight(w: Tensor, smooth: Tensor) -> Tensor:
    """W * smooth by columns: [N, K], [K] -> [N, K] in w's dtype."""
    return w * smooth.to(w.dtype)


def smoothing_vector(act_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """SVDQuant's migration strength: act_max^alpha / weight_max^(1 - alpha), 1 for dead channels.

    act_max     [K]   fp32   largest |x| seen in calibration
    weight_max  [K]   fp32   largest |W| of the column
    returns     [K]   fp32   positive, finite              (arXiv 2411.05007, section 4.2)
    """
    s = act_max.float().pow(alpha) / weight_max.float().clamp(min=1e-8).pow(1 - alpha)
    return torch.where((act_max > 0) & (weight_max > 0) & torch.isfinite(s), s, torch.ones_like(s))
