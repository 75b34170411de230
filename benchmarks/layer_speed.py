# ruff: noqa: E402  the pack is named before it is imported

"""Seconds and peak memory of every recipe on the linears of FLUX.1-dev, and the total they add up to.

    OMP_NUM_THREADS=1 python benchmarks/layer_speed.py [--device cuda] [--recipes instant,fast,best] [--tokens 2048]

Weights and inputs are synthetic: time does not depend on their values, but for how soon the paper's loop stops. Every
case runs in a process of its own, so that its peak memory is its own; one run each. On a CPU, seconds are the
process's own, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.svdquant.core.weights import INT4, INT4_UNSIGNED
from svdquant_nodes.svdquant.quantizer import recipes
from svdquant_nodes.svdquant.quantizer.jobs import round_weights
from svdquant_nodes.svdquant.quantizer.task import Sample, Task, freeze, relative_error

SHAPES = {  # N, K -> how many FLUX.1-dev has: 19 double blocks of two streams, 38 single blocks
    (3072, 3072): 76,
    (9216, 3072): 76,
    (12288, 3072): 76,
    (3072, 12288): 76,
}
MODULATIONS = {(18432, 3072): 38, (9216, 3072): 38}


def task(n: int, k: int, tokens: int, device: str) -> Task:
    """A linear with a few loud channels, and inputs for it."""
    torch.manual_seed(0)
    loud = torch.ones(k)
    loud[:: k // 8] = 20.0
    rows = (torch.randn(tokens, k) + 0.3) * loud
    if k > n:
        rows = torch.nn.functional.gelu(rows)
    sample = Sample.of(rows.bfloat16(), rows[: tokens // 4].bfloat16()).to(device)
    weight = (torch.randn(n, k) * 0.02).to(device)
    return Task(weight, torch.zeros(n, device=device), INT4_UNSIGNED if k > n else INT4, 32, sample)


def one(recipe: str, n: int, k: int, tokens: int, device: str) -> None:
    """Print seconds, peak bytes and the error of one case."""
    if recipe == "modulation":
        weight, bias = torch.randn(n, k) * 0.02, torch.zeros(n)
        began = clock(device)
        round_weights(weight, bias, 6 if n > 9216 else 3)
        print(clock(device) - began, 0.0)
    else:
        made = task(n, k, tokens, device)
        began = clock(device)
        fit = recipes.run(recipe, made)
        freeze(fit)
        error = relative_error(fit)
        print(clock(device) - began, error)
    print(torch.cuda.max_memory_allocated() if device == "cuda" else peak())


def clock(device: str) -> float:
    """Seconds of this process's own computing; of the wall on a GPU, once it has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak() -> int:
    """Largest resident size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(recipe: str, n: int, k: int, args: argparse.Namespace) -> tuple[float, float, int]:
    """Seconds, relative error and peak bytes of one case in a fresh process."""
    case = [recipe, str(n), str(k)]
    command = [
        sys.executable,
        __file__,
        "--case",
        *case,
        "--tokens",
        str(args.tokens),
        "--device",
        args.device,
    ]
    seconds, error, memory = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.split()
    return float(seconds), float(error), int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default="instant,fast,best")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        recipe, n, k = args.case
        return one(recipe, int(n), int(k), args.tokens, args.device)
    for recipe in ("modulation", *args.recipes.split(",")):
        total = 0.0
        for (n, k), count in (MODULATIONS if recipe == "modulation" else SHAPES).items():
            seconds, error, memory = measure(recipe, n, k, args)
            total += seconds * count
            print(
                f"{recipe:14} {n:6}x{k:<6} {seconds:8.1f} s  peak {memory / 2**30:5.1f} GB  error {error:.4f}",
                flush=True,
            )
        print(f"{recipe:14} FLUX.1-dev in all {total / 60:.0f} min", flush=True)
    return None


if __name__ == "__main__":
    main()
