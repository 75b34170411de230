"""Linear layers on a GPU: cuBLAS in bf16, ours in every spelling, torch's 8-bit products with a branch, ComfyUI's.

    python benchmarks/gpu.py --json out.json --markdown out.md [--seconds 240]
    python benchmarks/gpu.py --dry                                            # tiny shapes on the CPU: tries the script

All go from bf16 x to bf16 y with a bias and, but where it says otherwise, a branch. Inputs and weights take turns and
together exceed the L2 cache four times. A sample is a CUDA graph of calls; contenders take turns within a round, so
that a drifting clock hits all alike. The first contender runs once more at the end of each shape: the difference is the
noise. TFLOP/s count 2 M N K only. `error` is against the 4-bit weight multiplied exactly, on 64 tokens.
"""

# ruff: noqa: E402  the pack is named before it is imported

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import pack

pack.alias()
from svdquant_nodes.benchmarks.gpu_contenders import UNCHECKED, Contender, Work, contenders, make_work
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.kernels import gpu, ops

SHAPES = {  # M, N, K, how often in a FLUX.1-dev forward of 1024 x 1024
    "flux single qkv": (4608, 9216, 3072, 38),
    "flux single fc1": (4608, 12288, 3072, 38),
    "flux single out": (4608, 3072, 3072, 38),
    "flux single fc2": (4608, 3072, 12288, 38),
    "flux img qkv": (4096, 9216, 3072, 19),
    "flux img proj": (4096, 3072, 3072, 19),
    "flux img fc1": (4096, 12288, 3072, 19),
    "flux img fc2": (4096, 3072, 12288, 19),
    "flux txt qkv": (512, 9216, 3072, 19),
    "flux txt proj": (512, 3072, 3072, 19),
    "flux txt fc1": (512, 12288, 3072, 19),
    "flux txt fc2": (512, 3072, 12288, 19),
    "sdxl fc1": (2048, 10240, 1280, 0),
    "sdxl fc2": (2048, 1280, 5120, 0),
    "pixart qkv": (8192, 3456, 1152, 0),
    "pixart fc2": (8192, 1152, 4608, 0),
}
MODULATIONS = {"flux modulation": (1, 18432, 3072, 38), "flux single modulation": (1, 9216, 3072, 38)}
ATTENTION = (1, 24, 4608, 128)  # of FLUX, 57 times a step
DRY_SHAPES = {"flux single out": (8, 64, 128, 38), "sdxl fc2": (3, 64, 192, 0)}
DRY_MODULATIONS, DRY_ATTENTION = {"flux modulation": (1, 96, 64, 38)}, (1, 2, 8, 16)
CHECKED = 64  # tokens whose outputs are compared


def main() -> None:
    options = arguments()
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure (--dry tries the script on the CPU)")
    bench = Bench("cpu" if options.dry else "cuda", options.seconds)
    torch.manual_seed(0)
    facts = machine(bench.device)
    # all that live are to be timed: what is wrong shows in the errors
    with torch.inference_mode(), mock.patch.object(gpu, "trusted", gpu.survivors):
        attention, rows = bench.attention(), []
        try:
            for found in bench.run(options.ranks):
                rows += found
                report = {"machine": facts, "attention_ms": attention, "rows": rows}
                report |= {"left_out": bench.left_out, "steps": steps(rows, bench.shapes | bench.modulations)}
                write(report, options)
        except (KeyboardInterrupt, RuntimeError) as error:  # what was measured so far is written already
            raise SystemExit(f"ended early: {first_line(error)}") from error
    print(markdown(report))


def write(report: dict[str, object], options: argparse.Namespace) -> None:
    """Anew after each shape, since the next one may be one too many for the time or for the card."""
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(report) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seconds", type=float, default=240, help="no shape is begun after these")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args()


# ---- time ----


class Bench:
    """Measures shapes on a device until its time is over."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.end = device, time.perf_counter() + seconds
        dry = device == "cpu"
        self.shapes, self.modulations = (DRY_SHAPES, DRY_MODULATIONS) if dry else (SHAPES, MODULATIONS)
        self.calls, self.rounds = (1, 2) if dry else (20, 15)
        self.left_out: list[tuple[str, str, str]] = []  # shape, contender, why

    def run(self, ranks: list[int]) -> Iterator[list[dict[str, object]]]:
        """The rows of one shape after the other, and at last of those that there was no time for: none."""
        todo = [(name, shape, 0, True) for name, shape in self.modulations.items()]
        todo += [(name, shape, rank, False) for rank in ranks for name, shape in self.shapes.items()]
        for name, shape, rank, awq in todo:
            if time.perf_counter() > self.end:
                self.left_out.append((f"{name}, rank {rank}", "everything", "out of time"))
                continue
            found = self.measure(name, shape, rank, awq)
            print(name, rank, {row["name"]: round(row["median_ms"], 4) for row in found}, flush=True)
            yield found
        yield []

    def measure(
        self, name: str, shape: tuple[int, int, int, int], rank: int, awq: bool
    ) -> list[dict[str, object]]:
        """A row for every contender on one shape."""
        m, n, k, count = shape
        work = make_work(m, n, k, rank, self.sets(m, n, k), self.device, awq)
        samplers, errors = self.prepare(f"{name}, rank {rank}", work)
        samples: dict[str, list[float]] = {contender: [] for contender in samplers}
        for _ in range(self.rounds):
            for contender, sample in samplers.items():
                samples[contender].append(sample() / self.calls)
        baseline = statistics.median(samples["cublas_bf16"])
        return [
            dict(
                shape=name, m=m, n=n, k=k, rank=rank, count=count, name=contender, error=errors.get(contender)
            )
            | summary(times)
            | dict(tflops=2e-9 * m * n * k / statistics.median(times))
            | dict(speed_up=baseline / statistics.median(times))
            for contender, times in samples.items()
        ]

    def prepare(
        self, what: str, work: Work
    ) -> tuple[dict[str, Callable[[], float]], dict[str, float | None]]:
        """Samplers of all contenders that can run, checked; the baseline again at the end."""
        samplers, errors = {}, {}
        for contender, its_work, make in contenders(work, self.device):
            try:
                call = make(its_work)
                errors[contender] = None if UNCHECKED in contender else error_of(call, its_work)
                samplers[contender] = self.sampler(call)
            except Exception as error:  # one that cannot run here is reported, and the others go on
                self.left_out.append((what, contender, first_line(error)))
                if self.device == "cuda":
                    torch.cuda.synchronize()  # raises where the card is lost, and with it all others
        return samplers | {"cublas_bf16 again": samplers["cublas_bf16"]}, errors

    def sampler(self, call: Contender) -> Callable[[], float]:
        """Milliseconds of `calls` calls: a replay of a graph of them, or on a CPU the calls themselves."""
        if self.device == "cpu":
            return lambda: 1e3 * wall(lambda: [call(i) for i in range(self.calls)])
        captured = Captured(call, self.calls)
        captured()
        return captured

    def sets(self, m: int, n: int, k: int) -> int:
        """Inputs and layers that take turns: four L2 caches full of what the smallest of them reads."""
        if self.device == "cpu":
            return 2
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return min(32, max(2, 1 + 4 * cache // (2 * m * k + n * k // 2)))

    def attention(self) -> float:
        """Median milliseconds of one attention of FLUX, to set the sums against."""
        shape = ATTENTION if self.device == "cuda" else DRY_ATTENTION
        q = torch.randn(3, *shape, device=self.device).bfloat16()
        sample = self.sampler(lambda i: torch.nn.functional.scaled_dot_product_attention(*q))
        return statistics.median(sample() / self.calls for _ in range(self.rounds))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Captured:
    """A CUDA graph of calls. It keeps the contender too, whose tensors the graph reads and does not hold."""

    def __init__(self, call: Contender, calls: int) -> None:
        self.call, self.graph = call, torch.cuda.CUDAGraph()
        for i in range(3):
            call(i)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            for i in range(calls):
                call(i)

    def __call__(self) -> float:
        """Milliseconds of a replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summary(times: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return dict(median_ms=statistics.median(times), p10_ms=tenths[0], p90_ms=tenths[-1])


def error_of(call: Contender, work: Work) -> float:
    """||y - exact|| / ||exact|| of the first layer and some tokens of everywhere; NaN where anything is."""
    w, x = work.layers[0], work.xs[0]
    some = torch.linspace(0, len(x) - 1, min(CHECKED, len(x)), device=x.device).long()
    y = call(0)[some].double()
    exact = x[some].double() @ reference.dequantize(w).double().T
    if w.bias is not None:
        exact += w.bias.double()
    return float((y - exact).norm() / exact.norm())


# ---- report ----


def machine(device: str) -> dict[str, object]:
    found = {
        "device": "this CPU, dry",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"capability": [properties.major, properties.minor], "driver": driver()}
        found |= {"gemm_int4": ops.describe("cuda")}
    return found


def commit() -> str:
    return said("git", "-C", str(ROOT), "rev-parse", "HEAD")


def driver() -> str:
    return said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def steps(rows: list[dict[str, object]], shapes: dict[str, tuple[int, ...]]) -> list[dict[str, object]]:
    """The linears of one FLUX step by contender: each shape's median times its count."""
    found = []
    counted = {name for name, (*_, count) in shapes.items() if count}
    modulations = [row for row in rows if row["m"] == 1]
    for rank in sorted({row["rank"] for row in rows if row["m"] > 1}):
        for contender in dict.fromkeys(row["name"] for row in rows if row["rank"] == rank and row["m"] > 1):
            mine = [row for row in rows if (row["rank"], row["name"]) == (rank, contender) and row["count"]]
            mine += [
                r
                for r in modulations
                if r["name"] == (contender if "cublas" in contender else "svdquant_gemv")
            ]
            total = sum(row["count"] * row["median_ms"] for row in mine)
            left = sorted(counted - {row["shape"] for row in mine})
            found.append(dict(rank=rank, name=contender, milliseconds=total, without=left))
    return found


def markdown(report: dict[str, object]) -> str:
    rows, facts = report["rows"], [f"{name} {value}" for name, value in report["machine"].items()]
    lines = [", ".join(facts), "", f"One attention of FLUX, 57 a step: {report['attention_ms']:.3f} ms", ""]
    lines += ["## All linears of a FLUX.1-dev step", "", "| rank | contender | ms | |", "| --- " * 4 + "|"]
    for step in report["steps"]:
        note = f"without {', '.join(step['without'])}" if step["without"] else ""
        lines.append(f"| {step['rank']} | {step['name']} | {step['milliseconds']:.2f} | {note} |")
    for rank in sorted({row["rank"] for row in rows}):
        lines += [
            "",
            f"## Milliseconds, rank {rank}",
            "",
            *side_by_side([r for r in rows if r["rank"] == rank]),
        ]
    lines += ["", "## All figures", ""]
    lines += [
        "| rank | shape | contender | ms | p10 | p90 | TFLOP/s | against bf16 | error |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        figures = [f"{row[key]:.4f}" for key in ("median_ms", "p10_ms", "p90_ms")]
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        figures += [f"{row['tflops']:.0f}", f"{row['speed_up']:.2f}", error]
        lines.append(f"| {row['rank']} | {row['shape']} | {row['name']} | {' | '.join(figures)} |")
    return "\n".join([*lines, "", *not_measured(report["left_out"])])


def side_by_side(rows: list[dict[str, object]]) -> list[str]:
    """A table with a column for each contender that ends with an output: milliseconds, and times as fast as bf16."""
    names = [
        name for name in dict.fromkeys(row["name"] for row in rows) if "," not in name and "again" not in name
    ]
    shapes = dict.fromkeys((row["shape"], row["m"], row["n"], row["k"]) for row in rows)
    cells = {(r["shape"], r["name"]): f"{r['median_ms']:.3f} ({r['speed_up']:.2f})" for r in rows}
    lines = [f"| shape | M x N x K | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for shape, *sizes in shapes:
        figures = " | ".join(cells.get((shape, name), "") for name in names)
        lines.append(f"| {shape} | {' x '.join(map(str, sizes))} | {figures} |")
    return lines


def not_measured(left_out: list[tuple[str, str, str]]) -> list[str]:
    """One line for each contender and reason."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for shape, *why in left_out:
        shapes.setdefault(tuple(why), []).append(shape)
    return [
        f"- not measured: {contender} for {where[0] if len(where) == 1 else f'{len(where)} shapes'}: {reason}"
        for (contender, reason), where in shapes.items()
    ]


if __name__ == "__main__":
    main()
