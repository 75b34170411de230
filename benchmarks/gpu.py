"""Linear layers on a GPU: cuBLAS in bf16, ours in every spelling, fp8 through torch with a branch beside it, ComfyUI's.

    python benchmarks/gpu.py --json out.json --markdown out.md

All go from bf16 x to bf16 y with a bias. Inputs and weights take turns and together exceed the L2 cache four times.
A sample is a CUDA graph of calls; contenders take turns within a round, so that a drifting clock hits all alike. The
first contender runs once more at the end of each shape: the difference is the noise. TFLOP/s count 2 M N K only.
"""

# ruff: noqa: E402  the pack is named before it is imported

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.svdquant.core import linear
from svdquant_nodes.svdquant.core.weights import INT4, LinearWeights
from svdquant_nodes.svdquant.kernels import ops, select

SHAPES = {  # M, N, K, how often in a FLUX.1-dev forward of 1024 x 1024
    "flux img qkv": (4096, 9216, 3072, 19),
    "flux img proj": (4096, 3072, 3072, 19),
    "flux img fc1": (4096, 12288, 3072, 19),
    "flux img fc2": (4096, 3072, 12288, 19),
    "flux txt qkv": (512, 9216, 3072, 19),
    "flux txt proj": (512, 3072, 3072, 19),
    "flux txt fc1": (512, 12288, 3072, 19),
    "flux txt fc2": (512, 3072, 12288, 19),
    "flux single qkv": (4608, 9216, 3072, 38),
    "flux single fc1": (4608, 12288, 3072, 38),
    "flux single out": (4608, 3072, 3072, 38),
    "flux single fc2": (4608, 3072, 12288, 38),
    "sdxl fc1": (2048, 10240, 1280, 0),
    "sdxl fc2": (2048, 1280, 5120, 0),
    "pixart qkv": (8192, 3456, 1152, 0),
    "pixart fc2": (8192, 1152, 4608, 0),
}
CALLS, ROUNDS = 20, 15  # of a graph, and its replays

Contender = Callable[[int], Tensor]


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure")
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for rank in options.ranks:
            for name, shape in SHAPES.items():
                rows += measure_shape(name, shape, rank)
                print(
                    rows[-1]["shape"],
                    {r["name"]: round(r["median_ms"], 4) for r in rows if r["shape"] == name},
                    flush=True,
                )
    report = {"machine": machine(), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    text = table(rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args()


# ---- contenders ----


def contenders(m: int, n: int, k: int, rank: int) -> dict[str, Contender]:
    """Everything that can run here, the honest baseline first."""
    sets = min(8, max(2, 1 + 4 * l2_bytes() // (2 * m * k + 2 * n * k)))
    xs = [random(m, k) for _ in range(sets)]
    dense = [random(n, k) * k**-0.5 for _ in range(sets)]
    bias = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    found: dict[str, Contender] = {
        "cublas_bf16": lambda i: torch.nn.functional.linear(xs[i % len(xs)], dense[i % len(xs)], bias)
    }
    weights = [random_weights(n, k, rank) for _ in range(sets)]
    for spelling in our_spellings():
        found[f"svdquant_{spelling}"] = ours(spelling, xs, weights)
    if torch.cuda.get_device_capability() >= (8, 9):
        found["torch_fp8_and_branch"] = fp8_and_branch(xs, dense, weights)
    return found


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def random_weights(n: int, k: int, rank: int) -> LinearWeights:
    """Codes and scales as a Gaussian layer would have them: zeros would run faster."""
    return LinearWeights(
        INT4,
        torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8),
        (torch.rand(n, k // 64, device="cuda") + 0.5).bfloat16() * (0.4 * k**-0.5),
        smooth=torch.ones(k, device="cuda", dtype=torch.bfloat16),
        down=random(rank, k) * k**-0.5,
        up=random(n, rank) * 0.3,
        bias=random(n),
    )


def our_spellings() -> list[str]:
    here = ops.device("cuda")
    return [
        s.name
        for s in select.SPELLINGS
        if s.device == "cuda" and s.built and "gemm_int4" in s.ops and not s.needs(here)
    ]


def ours(spelling: str, xs: list[Tensor], weights: list[LinearWeights]) -> Contender:
    op_set = ops.OpSet(spelling)
    return lambda i: linear.linear(xs[i % len(xs)], weights[i % len(weights)], op_set).to(torch.bfloat16)


def fp8_and_branch(xs: list[Tensor], dense: list[Tensor], weights: list[LinearWeights]) -> Contender:
    """Rows and tokens in e4m3 through torch, the branch in bf16 beside it: what needs no kernel of ours."""

    def to_fp8(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().amax(-1, keepdim=True).float() / 448
        return (t / scale).to(torch.float8_e4m3fn), scale

    eight = [to_fp8(w) for w in dense]
    factors = [(w.down.T.contiguous(), w.up.T.contiguous()) for w in weights]

    def call(i: int) -> Tensor:
        x, (w, w_scale), (down, up) = xs[i % len(xs)], eight[i % len(xs)], factors[i % len(factors)]
        codes, scale = to_fp8(x)
        y = torch._scaled_mm(codes, w.T, scale_a=scale, scale_b=w_scale.T, out_dtype=torch.bfloat16)
        return torch.addmm(y, x @ down, up)

    return call


# ---- time ----


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def measure_shape(name: str, shape: tuple[int, int, int, int], rank: int) -> list[dict[str, object]]:
    m, n, k, count = shape
    graphs = {}
    for contender, call in contenders(m, n, k, rank).items():
        try:
            graphs[contender] = graph_of(call)
        except Exception as error:  # a contender that cannot run here is reported, and the others go on
            print(f"{name}, {contender}: {error}", file=sys.stderr)
            torch.cuda.synchronize()
    graphs["cublas_bf16 again"] = graphs["cublas_bf16"]
    samples: dict[str, list[float]] = {contender: [] for contender in graphs}
    for _ in range(ROUNDS):
        for contender, graph in graphs.items():
            samples[contender].append(milliseconds(graph.replay) / CALLS)
    baseline = statistics.median(samples["cublas_bf16"])
    rows = []
    for contender, times in samples.items():
        tenths = statistics.quantiles(times, n=10, method="inclusive")
        median = statistics.median(times)
        rows.append(
            dict(shape=name, m=m, n=n, k=k, rank=rank, count=count, name=contender)
            | dict(median_ms=median, p10_ms=tenths[0], p90_ms=tenths[-1])
            | dict(tflops=2e-9 * m * n * k / median, speed_up=baseline / median)
        )
    return rows


def graph_of(call: Contender) -> torch.cuda.CUDAGraph:
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    graph.replay()
    return graph


def milliseconds(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# ---- report ----


def machine() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a line a shape and contender, then the sum of FLUX's layers, the last line of each rank."""
    lines = ["| rank | shape | contender | ms | p10 | p90 | TFLOP/s | against bf16 |", "| --- " * 8 + "|"]
    for row in rows:
        figures = [f"{row[key]:.4f}" for key in ("median_ms", "p10_ms", "p90_ms")]
        figures += [f"{row['tflops']:.0f}", f"{row['speed_up']:.2f}"]
        lines.append(f"| {row['rank']} | {row['shape']} | {row['name']} | {' | '.join(figures)} |")
    for rank in dict.fromkeys(row["rank"] for row in rows):
        for name in dict.fromkeys(row["name"] for row in rows):
            flux = [row for row in rows if (row["rank"], row["name"]) == (rank, name) and row["count"]]
            total = sum(row["count"] * row["median_ms"] for row in flux)
            whole = len(flux) == sum(count > 0 for *_, count in SHAPES.values())
            note = "" if whole else f", of {len(flux)} shapes only"
            lines.append(f"| {rank} | FLUX.1-dev, all layers{note} | {name} | {total:.2f} | | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
