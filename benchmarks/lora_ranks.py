# ruff: noqa: E402  the pack is named before it is imported

"""What it costs to find the rank of what a LoRA adapter adds to a layer, at FLUX.1's sizes, and what it yields.

    OMP_NUM_THREADS=1 python benchmarks/lora_ranks.py [--sizes 3072x3072,12288x3072] [--limit 0.001] [--full]

Synthetic differences: exactly low-rank, low-rank beside noise, with singular values that fall as 1/i, and without any
structure. One run each; seconds are the process's own, so that other work on the machine does not count. `--full` adds
torch's whole SVD of the same matrix, for comparison.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.svdquant.adapters.lora import factors, truncation
from svdquant_nodes.svdquant.adapters.lora.factors import Factored

MOST = 1024  # ranks, where a LoRA is baked


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(n: int, k: int, rank: int, noise: float = 0.0) -> Tensor:
    """A product of two Gaussian factors, and noise of this part of its norm."""
    delta = random(n, rank, seed=1) @ random(rank, k, seed=2) / rank**0.5
    return delta + noise * random(n, k, seed=3) if noise else delta


def falling(n: int, k: int) -> Tensor:
    """Singular values 1/i, 512 of them, between two bases that are orthonormal but for sampling."""
    return (random(n, 512, seed=1) / torch.arange(1, 513)) @ random(512, k, seed=2)


def cases(n: int, k: int, limit: float) -> Iterator[tuple[str, Callable[[], Factored | None]]]:
    """Name and what is timed: as at run time, and as in baking."""
    halves = {
        f"hada_w{i}_{x}": random(*s, seed=i) for i in (1, 2) for x, s in (("a", (n, 16)), ("b", (16, k)))
    }
    whole = {"lokr_w1": random(16, 16), "lokr_w2": random(n // 16, k // 16)}
    thin = {"lokr_w1": random(16, 16), "lokr_w2_a": random(n // 16, 16), "lokr_w2_b": random(16, k // 16)}
    yield "LoHa of rank 16", lambda: factors.factor(halves)
    yield "LoKr, 16 x 16 and whole", lambda: factors.factor(whole)
    yield "  baked", lambda: truncation.kron_pair(factors.factor(whole).branches[0], limit, MOST)
    yield "LoKr, 16 x 16 and rank 16", lambda: factors.factor(thin)
    yield "  baked", lambda: truncation.kron_pair(factors.factor(thin).branches[0], limit, MOST)
    for name, delta in (
        ("difference of rank 64", low_rank(n, k, 64)),
        ("difference of rank 64, noise 0.05 %", low_rank(n, k, 64, 5e-4)),
        ("difference of rank 200", low_rank(n, k, 200)),
        ("difference that falls as 1/i", falling(n, k)),
        ("difference without structure", random(n, k)),
    ):
        yield name, lambda d=delta: truncation.truncated(d, limit)
        yield "  baked", lambda d=delta: truncation.truncated(d, limit, MOST)


def timed(call: Callable[[], Factored | None]) -> tuple[float, Factored | None]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def told(found: Factored | None) -> str:
    if found is None:
        return "not within the limit"
    rank = found.rank or "product of two"
    return f"{rank!s:>14}  {found.error:8.1e}  {found.nbytes / 2**20:7.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="3072x3072,12288x3072")
    parser.add_argument("--limit", type=float, default=0.001)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    for size in arguments.sizes.split(","):
        n, k = map(int, size.split("x"))
        print(f"\n{n} x {k}, limit {arguments.limit:g}; as 16 bits {n * k / 2**19:.0f} MB")
        print(f"{'':36} {'seconds':>8} {'rank':>14}  {'error':>8}")
        for name, call in cases(n, k, arguments.limit):
            seconds, found = timed(call)
            print(f"{name:36} {seconds:8.2f} {told(found)}", flush=True)
        if arguments.full:
            delta = random(n, k)
            seconds, _ = timed(lambda d=delta: torch.linalg.svd(d, full_matrices=False))
            print(f"{'torch.linalg.svd':36} {seconds:8.2f}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
