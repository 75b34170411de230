"""Say what a checkpoint is: dialect, family, and each layer's shape, precision, rank, act shift and bytes."""

from __future__ import annotations

import argparse
import json

from ...loaders.detect import open_checkpoint
from ...svdquant.adapters import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a checkpoint file or folder; only headers are read")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    found = report.describe(open_checkpoint(args.file))
    print(json.dumps(found.as_dict(), indent=2) if args.json else report.as_text(found))
    return 0
