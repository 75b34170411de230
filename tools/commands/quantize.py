"""Quantize a 16-bit diffusion model to an SVDQuant checkpoint, one linear at a time; a run that was stopped goes on.

A text encoder is quantized from its weights alone; of the options it takes --group, --device and --quiet.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ...loaders.encoders import recognise
from ...loaders.plan import Plan
from ...loaders.source import SourceModel, open_source
from ...svdquant.adapters.quantizing.plans import MODEL, make_plan
from ...svdquant.quantizer import choices, recipes, report, statistics, stream, text_encoder
from ...svdquant.quantizer.sensitivity import FORMATS, Limit
from .target import add_overwrite, check_target

UNITS = {"": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a .safetensors file or a folder: bf16, fp16, fp32 or scaled fp8"
    )
    parser.add_argument("target", metavar="DST", type=Path, help="the .safetensors file to write")
    parser.add_argument("--precision", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument(
        "--rank", type=int, default=32, help="of the 16-bit branch, a multiple of 16 up to 256"
    )
    parser.add_argument("--recipe", choices=recipes.RECIPES, help="best with --stats, else instant")
    parser.add_argument(
        "--stats", type=Path, metavar="FILE", help="what SVDQuant Calibrate saved for this model"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--center",
        action="store_true",
        help="let biases take the mean out of inputs: a smaller error, but LoRAs see other inputs",
    )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help="precision of the linears whose name matches: int4, nvfp4, awq or plain; may be repeated",
    )
    parser.add_argument(
        "--budget", metavar="SIZE", help="size of the file, 6.5GB for instance: precision and rank by linear"
    )
    parser.add_argument(
        "--error", metavar="PERCENT", help="output error of all linears together: the smallest file within it"
    )
    parser.add_argument(
        "--formats",
        metavar="LIST",
        help=f"what --budget and --error choose among, of {', '.join(FORMATS)} (--precision and plain)",
    )
    parser.add_argument(
        "--group",
        type=int,
        choices=text_encoder.GROUPS,
        help="of a text encoder: columns that share a scale (128)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only the summary")
    add_overwrite(parser)


def main(args: argparse.Namespace) -> int:
    began = time.monotonic()
    overrides = tuple(parse_override(text) for text in args.layer)
    limit = parse_limit(args.budget, args.error)
    if args.formats and limit is None:
        raise ValueError("--formats: expected --budget or --error beside it, got neither.")
    source = open_source(args.source)
    check_target(args.target, [source.path, *source.path.rglob("*.safetensors")], overwrite=args.overwrite)
    check_device(args.device)
    if recognise(source.shapes):
        return quantize_encoder(source, args)
    if args.group:
        raise ValueError("--group: expected a text encoder, got a diffusion model. Leave it out.")
    samples = statistics.load(args.stats) if args.stats else None
    plan = make_plan(
        source, precision=args.precision, rank=args.rank, centred=args.center, overrides=overrides
    )
    for note in plan.source.notes:
        print(f"note: {note}", file=sys.stderr)
    settings = stream.Settings(args.recipe or ("best" if samples else "instant"), args.seed, args.device)
    print(f"{source.path.name}: {plan.family}, {len(plan.jobs)} linears, recipe {settings.recipe}")
    if plan.family != MODEL and plan.write is plan.mixed:
        print(
            "note: written in the natural layout, since Nunchaku's has no place for --layer", file=sys.stderr
        )
    decision = decide(plan, limit, args, settings, samples) if limit else None
    if decision:
        plan = decision.plan
        print(decision.as_text())
    errors = stream.quantize(
        plan, args.target, settings, statistics=samples, progress=None if args.quiet else show
    )
    print(report.summary(args.target, errors, time.monotonic() - began, measured=samples is not None))
    if decision:
        print(f"choices: {choices.save(decision, args.target, errors)}")
    return 0


def quantize_encoder(source: SourceModel, args: argparse.Namespace) -> int:
    """An encoder needs no data. ValueError for options that ask for something else."""
    began, unfit = (
        time.monotonic(),
        {
            "--precision nvfp4": args.precision == "nvfp4",
            "--stats": args.stats,
            "--layer": args.layer,
            "--budget": args.budget,
            "--error": args.error,
        },
    )
    for option in (name for name, given in unfit.items() if given):
        raise ValueError(
            f"{option}: a text encoder is quantized from its weights alone, all to int4. Leave it out."
        )
    group = args.group or text_encoder.GROUPS[0]
    errors = text_encoder.quantize(
        source, args.target, group=group, device=args.device, progress=None if args.quiet else show
    )
    name = recognise(source.shapes).name
    print(f"{source.path.name}: {name}, {len(errors)} linears in int4 of group {group}")
    print(report.summary(args.target, errors, time.monotonic() - began, measured=False))
    return 0


def decide(
    plan: Plan, limit: Limit, args: argparse.Namespace, settings: stream.Settings, samples: Mapping | None
) -> choices.Decision:
    """The choice that --budget or --error asks for."""
    formats = args.formats.split(",") if args.formats else [args.precision, "plain"]
    progress = None if args.quiet else show_measured
    return choices.decide(plan, limit, formats, args.target, settings, statistics=samples, progress=progress)


def parse_limit(size: str | None, percent: str | None) -> Limit | None:
    """What --budget and --error say."""
    if size and percent:
        raise ValueError("--budget, --error: expected one of them, got both.")
    if size:
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMG]B)?", size.strip().upper())
        if not found:
            raise ValueError(
                f"--budget: expected a size such as 6.5GB, 900MB or a number of bytes, got {size!r}."
            )
        return Limit(nbytes=int(float(found[1]) * UNITS[found[2] or ""]))
    if percent:
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*%?", percent.strip())
        if not found or not float(found[1]):
            raise ValueError(f"--error: expected a percentage above 0, such as 5, got {percent!r}.")
        return Limit(error=float(found[1]) / 100)
    return None


def parse_override(text: str) -> tuple[str, str]:
    pattern, equals, precision = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"--layer: expected PATTERN=PRECISION, got {text!r}.")
    return pattern, precision


def check_device(name: str) -> None:
    """ValueError for a device that torch has not got here."""
    try:
        torch.zeros(1, device=name).item()  # which a device without memory has not
    except (RuntimeError, AssertionError, NotImplementedError) as reason:
        told = (str(reason) or type(reason).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {name}: expected a device that torch has here, got: {told}. Use cpu."
        ) from None


def show_measured(name: str, done: int, total: int) -> None:
    """One line on a terminal, rewritten; nothing in a log."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[Kmeasuring {done}/{total}  {name}", end=end, file=sys.stderr, flush=True)


def show(name: str, done: int, total: int, error: float | None) -> None:
    """One line a linear."""
    told = "weights only" if error is None else f"error {100 * error:6.2f} %"
    print(f"  {done:4}/{total}  {name:44} {told}", flush=True)
