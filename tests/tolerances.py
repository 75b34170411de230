"""How far a result may be from the truth: the one table, quoted in docs/numerics.md.

Codes, scales, stored orders and file bytes have no entry: they are compared with equality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Tolerance:
    """norm: limit of ||got - want|| / ||want||. peak: limit of max|got - want| / max|want|."""

    norm: float
    peak: float


TOLERANCES = {
    # fp32 sums of up to 12288 exact products, in any order: sqrt(K) roundings of 2^-24; 7e-7 at K = 6144
    "fp32_sum": Tolerance(norm=2e-6, peak=4e-6),
    # the same with a branch whose factors are split into two bf16 halves: 2^-17 of every hidden value is lost
    "split_branch": Tolerance(norm=5e-6, peak=1e-5),
    # the same on a card, whose tensor cores cut off what is below a sum's last bit instead of rounding: at each of the
    # 192 additions of K = 3072 (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores)
    "tensor_core_sum": Tolerance(norm=2e-5, peak=4e-5),
    # one rounding of the finished output to 16 bits: at most 2^-8 (bf16), 2^-11 (fp16) of a value
    "bf16_output": Tolerance(norm=2.5e-3, peak=3.92e-3),
    "fp16_output": Tolerance(norm=3.2e-4, peak=4.9e-4),
    # a matrix rebuilt from its singular vectors, computed in fp32
    "fp32_svd": Tolerance(norm=4e-6, peak=2e-5),
    # a product of two factors, each of them rounded to bf16
    "two_bf16_factors": Tolerance(norm=4e-3, peak=6e-3),
    # against a model of the published kernels, which accumulate in bf16 and are the less exact side
    "bf16_kernel": Tolerance(norm=6e-3, peak=8e-3),
    # weights and hidden values rounded to bf16 before the product, the output after it
    "weight_only_bf16": Tolerance(norm=6e-3, peak=1.2e-2),
    # Gaussian values rounded to 4 bits by groups, against the unrounded; a wrong row order gives 1.4
    "int4_weight": Tolerance(norm=0.115, peak=0.1),
    "nvfp4_weight": Tolerance(norm=0.105, peak=0.15),
    # the same for the activations of a whole layer, its branch exact; unsigned has 15 steps on one side
    "int4_layer": Tolerance(norm=0.11, peak=0.15),
    "int4_unsigned_layer": Tolerance(norm=0.075, peak=0.1),
    "nvfp4_layer": Tolerance(norm=0.09, peak=0.1),
    # a Gaussian weight in int8 by rows, and a layer of 4-bit weights made int8 against the same with exact activations
    "int8_weight": Tolerance(norm=0.009, peak=0.005),
    "int8_layer": Tolerance(norm=0.012, peak=0.015),
    # a whole model with exact activations against its fp32 twin: fp32 sums in another order, through 3 steps
    "host_twin": Tolerance(norm=1e-5, peak=2e-5),
    # the same with a LoRA that joins as a dense difference in the host's 16-bit LoRA dtype
    "host_dense_branch": Tolerance(norm=5e-3, peak=5e-3),
    # a latent through the linear VAE and back: two fp32 products with an orthonormal basis
    "demo_vae": Tolerance(norm=5e-6, peak=1e-5),
    # trained weights in int4 with 16 ranks beside them, their smoothing chosen for outputs and not for weights
    "demo_weight": Tolerance(norm=0.13, peak=0.2),
    # ComfyUI's FLUX class and ours, both fp32 on the same weights
    "demo_forward": Tolerance(norm=2e-6, peak=4e-6),
}


def _numbers(x: torch.Tensor | np.ndarray) -> np.ndarray:
    return x.detach().cpu().to(torch.float64).numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def distance(got: torch.Tensor | np.ndarray, want: torch.Tensor | np.ndarray) -> Tolerance:
    """What `assert_close` compares with a table entry."""
    got, want = _numbers(got), _numbers(want)
    error = np.abs(got - want)
    tiny = np.finfo(np.float64).tiny
    return Tolerance(
        norm=float(np.linalg.norm(error) / max(np.linalg.norm(want), tiny)),
        peak=float(error.max(initial=0) / max(np.abs(want).max(initial=0), tiny)),
    )


def assert_close(got: torch.Tensor | np.ndarray, want: torch.Tensor | np.ndarray, name: str) -> None:
    """Fail with the distances and the worst place; a NaN on one side only fails too."""
    got, want = _numbers(got), _numbers(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    limit, found = TOLERANCES[name], distance(got, want)
    if not (found.norm <= limit.norm and found.peak <= limit.peak):
        worst = np.unravel_index(np.argmax(np.nan_to_num(np.abs(got - want), nan=np.inf)), got.shape)
        raise AssertionError(
            f"{name}: norm {found.norm:.3g} (limit {limit.norm:.3g}), peak {found.peak:.3g} "
            f"(limit {limit.peak:.3g}); worst at {tuple(int(i) for i in worst)}: "
            f"got {got[worst]:.9g}, expected {want[worst]:.9g}"
        )
