# ruff: noqa: E402  the pack is named before it is imported

"""Time and error of quantizing single linears of text encoders in full size, and what a whole encoder comes to.

    OMP_NUM_THREADS=1 python benchmarks/text_encoders.py [--groups 128,64]

Weights are Gaussian: time does not depend on their values. Seconds are the process's own, so that other work on the
machine does not count; one run each.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.svdquant.quantizer import awq

ENCODERS = {  # blocks, and the linears of one as (N, K): how many
    "Qwen3 4B": (36, {(4096, 2560): 1, (1024, 2560): 2, (2560, 4096): 1, (9728, 2560): 2, (2560, 9728): 1}),
    "Qwen2.5-VL 7B": (28, {(3584, 3584): 2, (512, 3584): 2, (18944, 3584): 2, (3584, 18944): 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="128,64")
    groups = [int(text) for text in parser.parse_args().groups.split(",")]
    for name, (blocks, linears) in ENCODERS.items():
        for group in groups:
            total = 0.0
            for shape, count in linears.items():
                seconds, error = one(shape, group)
                total += blocks * count * seconds
                print(
                    f"{name}  {shape[0]:5} x {shape[1]:5}  group {group:3}  {seconds:6.2f} s  {100 * error:.2f} %",
                    flush=True,
                )
            print(f"{name}  all linears  group {group:3}  {total / 60:.1f} min", flush=True)


def one(shape: tuple[int, int], group: int) -> tuple[float, float]:
    """Seconds, and the relative error of the weight."""
    torch.manual_seed(0)
    weight = torch.randn(shape).mul_(shape[1] ** -0.5).bfloat16().float()
    began = time.process_time()
    _, error = awq.quantize_weight(weight, group)
    return time.process_time() - began, error


if __name__ == "__main__":
    main()
