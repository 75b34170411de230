"""All recipes on real trained layers, at the same file format and rank: relative output error on held-out tokens.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py PACKAGES --format int4 --rank 32 [--blocks 3] [--tokens 8192]

PACKAGES is made as real_layers.py says. dB = -20 log10(error), averaged over layers; every recipe is evaluated with
the arithmetic of svdquant/core/reference.py in bf16. Prints a table, and JSON lines with --json FILE.
"""

# ruff: noqa: E402  the pack is named before it is imported

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.benchmarks import real_layers
from svdquant_nodes.svdquant.core.weights import INT4, INT4_UNSIGNED, NVFP4
from svdquant_nodes.svdquant.quantizer import recipes, smoothing
from svdquant_nodes.svdquant.quantizer.task import Fit, Sample, Task, relative_error, start


def nearest_only(fit: Fit) -> Fit:
    """No smoothing, no branch: what four bits cost if nothing is done."""
    return recipes.round_nearest(fit, clipped=False)


def fixed_alpha(fit: Fit) -> Fit:
    """Smoothing with a = 1/2, a branch by SVD, nearest codes."""
    return smoothing.trial(smoothing.fixed(fit))


ROWS: dict[str, tuple[Callable[[Fit], Fit], bool]] = {  # name -> recipe, centred inputs
    "round to nearest": (nearest_only, False),
    "svdquant, alpha 1/2": (fixed_alpha, False),
    "instant": (recipes.instant, False),
    "svdquant": (recipes.svdquant, False),
    "svdquant+gptq": (recipes.svdquant_gptq, False),
    "fast": (recipes.fast, False),
    "fast, centred": (recipes.fast, True),
    "best": (recipes.best, False),
    "best, centred": (recipes.best, True),
}


def task_of(layer: real_layers.Layer, fmt: str, rank: int, tokens: int, centred: bool) -> Task:
    """The layer as the quantizer sees it; after a GELU nothing is centred, since no bias could take it out."""
    sample = Sample.of(layer.rows[:tokens].bfloat16(), layer.held.bfloat16())
    spec = NVFP4 if fmt == "nvfp4" else INT4_UNSIGNED if layer.after_gelu else INT4
    center = sample.mean if centred and not layer.after_gelu else None
    return Task(layer.weight, layer.bias, spec, rank, sample, center)


def decibels(errors: list[float]) -> float:
    return sum(-20 * math.log10(e) for e in errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    parser.add_argument("--format", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--blocks", default="3", help="comma-separated, 0..5")
    parser.add_argument("--tokens", type=int, default=real_layers.CALIBRATION)
    parser.add_argument("--only", help="comma-separated ends of layer names, such as qkv,fc1")
    parser.add_argument("--recipes", help="rows of the table, separated by semicolons; all by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers = real_layers.load(args.packages, {int(b) for b in args.blocks.split(",")})
    if args.only:
        layers = [one for one in layers if one.name.endswith(tuple(args.only.split(",")))]
    print(f"{args.format}, rank {args.rank}, {len(layers)} layers, {args.tokens} calibration tokens")
    for name in args.recipes.split(";") if args.recipes else ROWS:
        recipe, centred = ROWS[name]
        errors, began = {}, time.perf_counter()
        for layer in layers:
            task = task_of(layer, args.format, args.rank, args.tokens, centred)
            errors[layer.name] = relative_error(recipe(start(task)))
        seconds = (time.perf_counter() - began) / len(layers)
        mean = decibels(list(errors.values()))
        each = " ".join(f"{100 * e:.2f}" for e in errors.values())
        print(
            f"{name:22} {mean:6.2f} dB {100 * 10 ** (-mean / 20):6.2f} %  {seconds:5.1f} s   {each}",
            flush=True,
        )
        if args.json:
            line = dict(
                format=args.format, rank=args.rank, tokens=args.tokens, recipe=name, db=mean, errors=errors
            )
            with args.json.open("a") as file:
                file.write(json.dumps({**line, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()
