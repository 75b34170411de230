"""Linear layers: torch in 32 and 16 bits, ComfyUI's eager SVDQuant ops, and ours in every spelling this machine has.

    python benchmarks/kernels.py --device cpu --shape 64x3072x3072 --threads 1 --json out.json

All go from 16-bit x to 16-bit y with a bias, except torch_fp32, which is all fp32; ours and ComfyUI's have a low-rank
branch. Weights take turns and together exceed the caches. Times are medians over interleaved rounds.

--isa avx2 runs torch, oneDNN and MKL as on a processor without AVX-512; our rows are then those of AVX2.
"""

# ruff: noqa: E402  the pack is named before it is imported

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.benchmarks import timing
from svdquant_nodes.svdquant.core import int8, linear, reference
from svdquant_nodes.svdquant.core.linear import Part
from svdquant_nodes.svdquant.core.weights import AWQ, INT4, INT4_UNSIGNED, NVFP4, LinearWeights
from svdquant_nodes.svdquant.kernels import ops, select

CACHE_BYTES = 128 * 2**20  # larger than the last cache of most processors
FORMATS = {
    "w4a4": INT4,
    "w4a4_unsigned": INT4_UNSIGNED,
    "nvfp4": NVFP4,
    "awq": AWQ,
    "w8a8": INT4,
}  # as stored
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
NO_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def main() -> None:
    options = arguments()
    if options.isa == "avx2" and os.environ.get("ATEN_CPU_CAPABILITY") != "avx2":
        os.environ.update(NO_AVX512)  # read when torch is loaded: begin again
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        calls = contenders(options)
        rows = timing.measure(calls, seconds=options.seconds, clock=CLOCKS[options.clock])
    print(table(rows, options))
    if options.json:
        shape = dict(zip("mnk", options.shape, strict=True), rank=options.rank, format=options.format)
        report = {
            "machine": timing.machine(),
            "shape": shape,
            "clock": options.clock,
            "rows": [row.row() for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--shape", type=shape, default=(64, 3072, 3072), help="MxNxK")
    parser.add_argument("--format", choices=FORMATS, default="w4a4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=["best", "avx2"], default="best")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: time of others left out")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def shape(text: str) -> tuple[int, int, int]:
    m, n, k = map(int, text.split("x"))
    return m, n, k


def contenders(options: argparse.Namespace) -> dict[str, timing.Contender]:
    m, n, k = options.shape
    x = torch.randn(m, k)
    calls = {"torch_fp32": dense(x, n), "torch_bf16": dense(x.bfloat16(), n)}
    layers = [random_linear(options, seed) for seed in range(copies(weight_bytes(options)))]
    if options.format == "w4a4" and importlib.util.find_spec("comfy_kitchen"):
        calls["comfy_kitchen_eager"] = kitchen(x.bfloat16(), layers[0])
    for name, op_set in op_sets(options.isa).items():
        calls[f"svdquant_{options.format}_{name}"] = quantized(x.bfloat16(), layers, op_set)
    return calls


def op_sets(isa: str) -> dict[str, object]:
    """Our spellings that run here, best first, and the reference."""
    here = [row.name for row in select.SPELLINGS if row.name in ops.device("cpu").features]
    named = {name: ops.OpSet(name) for name in here if not (isa == "avx2" and name == "avx512")}
    return {**named, "reference": reference}


def weight_bytes(options: argparse.Namespace) -> int:
    _, n, k = options.shape
    return n * k if options.format == "w8a8" else n * k // 2


def copies(nbytes: int) -> int:
    return -(-CACHE_BYTES // nbytes)


def dense(x: Tensor, n: int) -> timing.Contender:
    k = x.shape[1]
    weights = [torch.randn(n, k).to(x.dtype) for _ in range(copies(n * k * x.element_size()))]
    bias = torch.randn(n).to(x.dtype)
    return lambda i: torch.nn.functional.linear(x, weights[i % len(weights)], bias)


def random_linear(options: argparse.Namespace, seed: int) -> LinearWeights:
    """Any codes are weights; only the values of the scales matter, and only to the check."""
    _, n, k = options.shape
    spec, t = FORMATS[options.format], torch.bfloat16
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.rand(n, k // spec.group).mul(0.02).add(0.01)
    bias = torch.randn(n).to(t)
    if spec.format == "awq":
        return LinearWeights(spec, codes, scales.to(t), zeros=(-7 * scales).to(t), bias=bias)
    branch = dict(
        smooth=torch.rand(k).add(0.5).to(t),
        down=torch.randn(options.rank, k).mul(k**-0.5).to(t),
        up=torch.randn(n, options.rank).to(t),
        bias=bias,
    )
    if spec.format == "nvfp4":
        return LinearWeights(spec, codes, scales.to(torch.float8_e4m3fn), torch.ones(1).to(t), **branch)
    weights = LinearWeights(spec, codes, scales.to(t), **branch)
    return int8.requantize(weights) if options.format == "w8a8" else weights


def quantized(x: Tensor, layers: list[LinearWeights], op_set: object) -> timing.Contender:
    """What a host's layer does, checked against the reference on the first tokens."""
    parts = [(Part(w),) for w in layers]  # with their biases, as a host's layer keeps them
    first = x[:16]
    got, want = (linear.forward(first, parts[0], None, (), which) for which in (op_set, reference))
    torch.testing.assert_close(got, want, rtol=2**-7, atol=float(want.abs().max()) * 2**-8)
    return lambda i: linear.forward(x, parts[i % len(parts)], None, (), op_set)


def kitchen(x: Tensor, w: LinearWeights) -> timing.Contender:
    """The same layer through the ops that ComfyUI brings; on a CPU they are plain torch."""
    import comfy_kitchen

    codes, scales, down = w.codes.view(torch.int8), w.scales.T.contiguous(), w.down.T.contiguous()

    def call(i: int) -> Tensor:
        acts, act_scales, hidden = comfy_kitchen.quantize_svdquant_w4a4(x, w.smooth, down)
        y = comfy_kitchen.scaled_mm_svdquant_w4a4(acts, codes, act_scales, scales, hidden, w.up, w.bias)
        return y[: x.shape[0]]

    return call


def table(rows: list[timing.Timing], options: argparse.Namespace) -> str:
    """Medians with what they mean: against torch, operations, and weights read."""
    m, n, k = options.shape
    times = {row.name: row.median_ms for row in rows}
    machine = timing.machine()
    lines = [
        f"M {m}  N {n}  K {k}  rank {options.rank}  {options.format}",
        f"{machine['processor']}, {options.threads} threads, torch {machine['torch']} {machine['torch_capability']}, "
        f"{options.clock} clock, load {machine['load_average'][0]:.1f}, {rows[0].rounds} rounds",
        f"{'':30}{'median':>9}{'p10':>9}{'p90':>9} ms{'x fp32':>9}{'x bf16':>9}{'GOP/s':>8}{'GB/s':>8}",
    ]
    for row in rows:
        speed = 2e-6 * m * n * k / row.median_ms
        read = 1e-6 * weight_bytes(options) / row.median_ms if row.name.startswith("svdquant") else None
        lines.append(
            f"{row.name:30}{row.median_ms:9.3f}{row.p10_ms:9.3f}{row.p90_ms:9.3f}   "
            f"{times['torch_fp32'] / row.median_ms:9.2f}{times['torch_bf16'] / row.median_ms:9.2f}{speed:8.0f}"
            f"{'' if read is None else f'{read:8.2f}'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
