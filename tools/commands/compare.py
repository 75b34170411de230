"""How far a 4-bit checkpoint is from its 16-bit original: linear by linear, of weights or, with statistics, of outputs;
and, with --draw, in pictures drawn from the same noise, with PSNR, SSIM, LPIPS where installed, time and memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...loaders.checkpoint import Checkpoint
from ...loaders.detect import open_checkpoint
from ...loaders.source import Job, SourceModel, open_source
from ...svdquant.adapters.conventions import straighten
from ...svdquant.adapters.families import resolve
from ...svdquant.adapters.family import Role, apply_role
from ...svdquant.adapters.quantizing.plans import make_plan
from ...svdquant.core import linear, reference
from ...svdquant.core.weights import LinearWeights
from ...svdquant.quantizer import report, statistics
from ...svdquant.quantizer.task import Sample
from . import compare_pictures


@dataclass(frozen=True)
class Found:
    """One linear: what it is, and its relative error."""

    name: str
    precision: str
    rank: int
    nbytes: int
    error: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the 16-bit original")
    parser.add_argument("made", metavar="FILE", help="the 4-bit checkpoint")
    parser.add_argument(
        "--stats", type=Path, metavar="FILE", help="statistics: compare outputs on held-out inputs"
    )
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="PNG",
        help="draw with both in a ComfyUI and save panels with the difference",
    )
    parser.add_argument(
        "--workflow", type=Path, metavar="FILE", help="what --draw runs, in API form (the demo model's)"
    )
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="models folder with text encoders and VAE (COMFYUI_PATH's)"
    )
    parser.add_argument("--device", choices=("cpu", "auto"), default="cpu", help="of --draw; auto: any GPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    if args.draw:
        print(draw(args))
        return 0
    source, checkpoint = open_source(args.source), open_checkpoint(args.made)
    samples = statistics.load(args.stats) if args.stats else {}
    found = sorted(compare(source, checkpoint, samples), key=lambda one: -one.error)
    if not found:
        raise ValueError(
            f"{checkpoint.path.name}: expected linears of {source.path.name}, got none of the same name."
        )
    if args.json:
        print(json.dumps([vars(one) for one in found], indent=2))
        return 0
    for one in found:
        print(
            f"  {one.name:<44} {one.precision:6} r{one.rank:<4} {one.nbytes / 2**20:8.2f} MB {100 * one.error:7.2f} %"
        )
    mean = report.decibels({one.name: one.error for one in found})
    print(
        f"{len(found)} linears, worst first; mean error of {'outputs' if samples else 'weights'} {mean:.2f} dB"
    )
    return 0


def draw(args: argparse.Namespace) -> str:
    """Panels and the node's report; the pictures are drawn by the host, so nothing is computed here."""
    if not args.draw.absolute().parent.is_dir():
        raise ValueError(f"--draw {args.draw}: expected an existing folder, got none. Make it first.")
    models = args.models or compare_pictures.default_models()
    return compare_pictures.draw(
        Path(args.source),
        Path(args.made),
        args.draw,
        workflow=args.workflow,
        models=models,
        device=args.device,
    )


def compare(source: SourceModel, checkpoint: Checkpoint, samples: dict[str, Sample]) -> Iterator[Found]:
    """Every linear that both files have; with samples, only those that have one."""
    plan, family = make_plan(source, rank=0), resolve(checkpoint)
    roles = family.roles(checkpoint) if family else {}
    for job in plan.jobs:
        if job.name not in checkpoint.info or (samples and (job.chunks or job.reads not in samples)):
            continue
        role = roles.get(job.name, Role())
        weights = apply_role(checkpoint.layers[job.name], role)
        if role.splits:
            weights = straighten(weights, role.splits)
        info = checkpoint.info[job.name]
        error = error_of(plan.source, job, weights, samples)
        yield Found(job.name, weights.spec.format, weights.rank, info.nbytes, error)


def error_of(source: SourceModel, job: Job, weights: LinearWeights, samples: dict[str, Sample]) -> float:
    """||y4 - y16|| / ||y16 - bias|| on the held-out rows, or of the weights."""
    weight, bias = source.cut(job)
    if not samples:
        return relative(reference.dequantize(weights), weight)
    x = samples[job.reads].held[:, slice(*job.columns)]
    wanted = x.float() @ weight.T
    y = linear.linear(x, weights, reference)
    return relative(y if bias is None else y - bias, wanted)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
