# ruff: noqa: E402  the pack is named before it is imported

"""What four bits cost a layer, and what smoothing and the branch give back: the table of docs/numerics.md.

    OMP_NUM_THREADS=1 python benchmarks/error_budget.py [--seeds 3]

A Gaussian [512, 3072] weight on 256 Gaussian tokens in bf16. "Outliers" makes one channel in a hundred 30 times larger.
Relative errors of the output against float64, mean over the seeds: the weight rounded alone, the activations alone,
both, and a 4-bit layer that runs in 8 bits. The last line is a GELU's output with signed and with unsigned codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.svdquant.core import fp4, int4, int8, linear, lowrank, reference, smooth, weight_only
from svdquant_nodes.svdquant.core.weights import GELU_SHIFT, INT4, NVFP4, LinearWeights, QuantSpec

N, K, TOKENS, RANK = 512, 3072, 256, 32
T = torch.bfloat16
ROWS = {  # outliers, smoothing, rank
    "Gaussian, nothing done": (False, False, 0),
    "outliers, nothing done": (True, False, 0),
    "outliers, smooth (α = ½)": (True, True, 0),
    "outliers, smooth and rank 32": (True, True, RANK),
}


def drawn(seed: int, *, outliers: bool) -> tuple[Tensor, Tensor]:
    """Weight [N, K] fp32 and tokens [M, K] bf16."""
    draw = torch.Generator().manual_seed(seed)
    w, x = torch.randn(N, K, generator=draw) * K**-0.5, torch.randn(TOKENS, K, generator=draw)
    if outliers:
        x[:, torch.randperm(K, generator=draw)[: K // 100]] *= 30
    return w, x.to(T)


def quantized(w: Tensor, x: Tensor, spec: QuantSpec, *, smoothed: bool, rank: int) -> LinearWeights:
    """The layer by the plain recipe: one smoothing exponent, SVD, nearest codes; a shift's share in the bias."""
    s = torch.ones(K)
    if smoothed:
        s = smooth.smoothing_vector(x.float().abs().amax(0), w.abs().amax(0), 0.5).to(T).float()
    factor, up, _ = lowrank.split(smooth.smooth_weight(w, s), rank)
    down, up = lowrank.unsmooth(factor, s, T), up.to(T)
    residual = smooth.smooth_weight(w - up.float() @ down.float(), s)
    second = {}
    if spec.format == "nvfp4":
        codes, scales, second["second_scale"] = fp4.quantize_weight(residual, T)
    else:
        codes, scales = int4.quantize_weight(residual, T)
    made = LinearWeights(spec, codes, scales, smooth=s, down=down, up=up, bias=torch.zeros(N), **second)
    return replace(made, bias=-reference.shift_compensation(made))


def errors(w: Tensor, x: Tensor, made: LinearWeights) -> Mapping[str, float]:
    """||y' - y|| / ||y|| of the layer with one half of its rounding, with both, and in 8 bits."""
    exact = x.double() @ w.double().T
    whole = reference.dequantize(made).double()
    found = {
        "weight": linear.linear(x.float(), made, weight_only),
        "both": linear.linear(x, made, reference),
        "in 8 bits": linear.linear(x, int8.requantize(made), reference),
    }
    found["activation"] = found["both"].double() + x.double() @ (w.double() - whole).T
    return {name: float((y - exact).norm() / exact.norm()) for name, y in found.items()}


def after_gelu(seed: int) -> tuple[float, float]:
    """What activations cost with signed codes, and with unsigned ones."""
    w, x = drawn(seed, outliers=False)
    x = torch.nn.functional.gelu(x.float(), approximate="tanh").to(T)
    signed = errors(w, x, quantized(w, x, INT4, smoothed=False, rank=0))
    unsigned = errors(w, x, quantized(w, x, replace(INT4, act_shift=GELU_SHIFT), smoothed=False, rank=0))
    return signed["activation"], unsigned["activation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    columns = ("weight", "activation", "both", "in 8 bits")
    print("| | int4:", " | ".join(columns), "| NVFP4:", " | ".join(columns), "|")
    for name, (outliers, smoothed, rank) in ROWS.items():
        cells = []
        for spec in (INT4, NVFP4):
            runs = []
            for seed in seeds:
                w, x = drawn(seed, outliers=outliers)
                runs.append(errors(w, x, quantized(w, x, spec, smoothed=smoothed, rank=rank)))
            cells += [f"{sum(run[column] for run in runs) / len(runs):.3f}" for column in columns]
        print("|", " | ".join([name, *cells]), "|")
    signed, unsigned = (sum(side) / len(side) for side in zip(*map(after_gelu, seeds), strict=True))
    print(f"activations after a GELU, int4: {signed:.3f} signed, {unsigned:.3f} unsigned")


if __name__ == "__main__":
    main()
