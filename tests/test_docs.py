"""What docs/ quotes is what the code and the golden vectors say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from svdquant_nodes.tests import golden, oracle
from svdquant_nodes.tests.tolerances import TOLERANCES

DOCS = Path(__file__).resolve().parents[1] / "docs"


def text(name):
    return (DOCS / name).read_text(encoding="utf-8")


def test_numerics_quotes_every_tolerance():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| .+ \|$", text("numerics.md"), re.MULTILINE)
    quoted = {name: (float(norm), float(peak)) for name, norm, peak in rows}
    assert quoted == {name: (limit.norm, limit.peak) for name, limit in TOLERANCES.items()}


def test_hex_dump_is_the_golden_file():
    stored = golden.case("svdq_int4_linear", "c0")["packed.qweight"].view(torch.uint8).flatten()
    lines = re.findall(
        r"^    ([0-9a-f]{5})  ((?:[0-9a-f]{2} ){15}[0-9a-f]{2}) ", text("format.md"), re.MULTILINE
    )
    assert [int(offset, 16) for offset, _ in lines] == [0, 16, 32, 48, 64]
    dumped = b"".join(bytes.fromhex(row) for _, row in lines)
    assert dumped == bytes(stored[:80].tolist())


def test_hex_dump_is_decoded_rightly():
    codes = golden.case("svdq_int4_linear", "c0")["logical.q"]
    pattern = r"^    bytes (\w\w)\.\.\w\w  row (\d), columns +(\d+)\.\.(\d+) +((?:-?\d+ +){7}-?\d+)"
    rows = re.findall(pattern, text("format.md"), re.MULTILINE)
    assert len(rows) == 6
    for byte, row, first, last, values in rows:
        n, k = int(row), int(first)
        assert oracle.p1(n, k, 128) == 2 * int(byte, 16)
        assert [int(v) for v in values.split()] == codes[n, k : int(last) + 1].tolist()


@pytest.mark.parametrize("name, cap", [("numerics.md", 150), ("format.md", 250)])
def test_documents_stay_short(name, cap):
    assert len(text(name).splitlines()) <= cap


ENGINE = DOCS.parent / "svdquant"
PLACED = [p.relative_to(ENGINE) for p in ENGINE.glob("*/**/*.py") if p.stem != "__init__"]
MODULES = sorted(p for p in PLACED if p.parent.name != "families")  # whose tables docs/models.md tells


def test_architecture_places_every_module():
    table = re.findall(r"^\| `([\w/]+)/`: .+? \| (.+) \|$", text("architecture.md"), re.MULTILINE)
    told = sorted(Path(room, f"{name}.py") for room, files in table for name in re.findall(r"`(\w+)`", files))
    assert told == MODULES


MAPS = ("quantizer", "adapters", "adapters/lora", "adapters/baking", "adapters/quantizing")


@pytest.mark.parametrize("room", MAPS)
def test_a_rooms_map_names_every_module(room):
    told = set(re.findall(r"\w+", ast.get_docstring(ast.parse((ENGINE / room / "__init__.py").read_text()))))
    assert {path.stem for path in (ENGINE / room).glob("*.py")} - {"__init__"} <= told
