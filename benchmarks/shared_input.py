"""Linears that read the same input (q, k and v that the host keeps apart), with and without one quantization for all.

    python benchmarks/shared_input.py --device cpu --shape 4096x640x640 --linears 3 --threads 1 --json out.json

apart     each layer quantizes its input
shared    the first one does, and a slot hands it to the others, as in a loaded model
fused     one layer of all rows, as the file stores them: what sharing can reach at best
quantize  of it, quantizing once

All give the same bits, which is checked. Weights and inputs take turns. Times are medians over interleaved rounds.
"""

# ruff: noqa: E402  the pack is named before it is imported

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.benchmarks import kernels, timing
from svdquant_nodes.svdquant.core import linear
from svdquant_nodes.svdquant.core.linear import Part
from svdquant_nodes.svdquant.core.sharing import Input, Reader, Slot
from svdquant_nodes.svdquant.core.weights import LinearWeights
from svdquant_nodes.svdquant.kernels import ops

FORMATS = tuple(name for name in kernels.FORMATS if name != "awq")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        calls = contenders(options)
        check(calls)
        rows = timing.measure(calls, seconds=options.seconds, clock=kernels.CLOCKS[options.clock])
    print(table(rows, options))
    if options.json:
        shape = dict(zip("mnk", options.shape, strict=True), linears=options.linears, format=options.format)
        report = {"machine": timing.machine(), "shape": shape, "rows": [row.row() for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--shape", type=kernels.shape, default=(4096, 640, 640), help="MxNxK of one linear")
    parser.add_argument("--linears", type=int, default=3)
    parser.add_argument("--format", choices=FORMATS, default="w4a4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=kernels.CLOCKS, default="wall", help="processor: time of others left out"
    )
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def contenders(options: argparse.Namespace) -> dict[str, timing.Contender]:
    m, n, k = options.shape
    whole = argparse.Namespace(**{**vars(options), "shape": (m, n * options.linears, k)})
    count = kernels.copies(kernels.weight_bytes(whole))
    stored = [replace(kernels.random_linear(whole, seed), bias=None) for seed in range(min(count, 16))]
    split = [layers(weights, options.linears) for weights in stored]
    inputs = [torch.randn(m, k).bfloat16() for _ in range(4)]
    slot = Slot()

    def each(i: int, shared: Slot | None) -> list[Tensor]:
        x = inputs[i % len(inputs)]
        return [linear.forward(x, (part,), None, (), ops, shared) for part in split[i % len(split)]]

    def fused(i: int) -> tuple[Tensor, ...]:
        return linear.linear(
            inputs[i % len(inputs)], stored[i % len(stored)], ops, dtype=torch.bfloat16
        ).split(n, dim=-1)

    return {
        "apart": lambda i: each(i, None),
        "shared": lambda i: each(i, slot),
        "fused": fused,
        "quantize": lambda i: linear.quantize(inputs[i % len(inputs)], stored[i % len(stored)], ops),
    }


def layers(weights: LinearWeights, count: int) -> list[Part]:
    """Equal shares of a linear's rows, each with tensors of its own, as a host loads them."""
    height, shared = weights.out_features // count, Input("benchmark", count)
    parts = []
    for i in range(count):
        share = weights.rows(slice(i * height, (i + 1) * height))
        own = {name: t.clone() for name, t in share.tensors().items()}
        parts.append(Part(replace(share, **own), reader=Reader(shared, i)))
    return parts


def check(calls: dict[str, timing.Contender]) -> None:
    want = calls["apart"](0)
    for name in ("shared", "fused"):
        for one, other in zip(want, calls[name](0), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)


def table(rows: list[timing.Timing], options: argparse.Namespace) -> str:
    m, n, k = options.shape
    machine, times = timing.machine(), {row.name: row.median_ms for row in rows}
    lines = [
        f"M {m}  N {n} x {options.linears}  K {k}  rank {options.rank}  {options.format}",
        f"{machine['processor']}, {options.threads} threads, torch {machine['torch']}, {options.clock} clock, "
        f"load {machine['load_average'][0]:.1f}, {rows[0].rounds} rounds",
        f"{'':12}{'median':>9}{'p10':>9}{'p90':>9} ms{'of apart':>10}",
    ]
    for row in rows:
        share = row.median_ms / times["apart"]
        lines.append(f"{row.name:12}{row.median_ms:9.3f}{row.p10_ms:9.3f}{row.p90_ms:9.3f}{share:13.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
