"""The pack keeps the rules of tests/architecture.py, and the rules catch what they are for."""

from __future__ import annotations

import textwrap

import pytest

from svdquant_nodes.tests.architecture import findings, kernel_lengths, unresolved
from svdquant_nodes.tools.pack import ROOT

# Key of a finding -> why it is right all the same. Fewer than five.
EXCEPTIONS: dict[str, str] = {}


def test_pack_keeps_the_rules():
    breaches = [finding.text for finding in findings(ROOT) if finding.key not in EXCEPTIONS]
    assert not breaches, "\n".join(breaches)


def test_every_import_of_ours_leads_somewhere():
    assert list(unresolved(ROOT)) == []


def test_an_import_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text(
        "from .b import there\nfrom . import b, gone\nfrom .b import missing"
    )
    (tmp_path / "core" / "b.py").write_text("there = 1")
    (tmp_path / "c.py").write_text(
        "from svdquant_nodes.core.a import there\nfrom svdquant_nodes.old import a"
    )
    assert list(unresolved(tmp_path)) == [
        "c.py:2: no a in old",
        "core/a.py:2: no gone in core",
        "core/a.py:3: no missing in core/b",
    ]


def test_exceptions_are_few_and_needed():
    keys = {finding.key for finding in findings(ROOT)}
    assert len(EXCEPTIONS) < 5
    assert set(EXCEPTIONS) <= keys


def lines(count):
    return "x = 1\n" * count


def function(name, count, parameters=""):
    return f"def {name}({parameters}):\n" + "    x = 1\n" * (count - 1)


def method(name, count):
    return "class A:\n" + textwrap.indent(function(name, count), "    ")


ELEVEN = ", ".join(f"p{i}" for i in range(11))
PLANTED = {
    "core-imports-kernels": ("svdquant/core/a.py", "from ..kernels import ops", "direction"),
    "core-imports-loaders": ("svdquant/core/a.py", "from ...loaders.detect import read", "direction"),
    "kernels-import-loaders": ("svdquant/kernels/a.py", "from ...loaders import detect", "direction"),
    "loaders-import-kernels": ("loaders/a.py", "from ..svdquant.kernels import ops", "direction"),
    "quantizer-imports-adapters": ("svdquant/quantizer/a.py", "from ..adapters import load", "direction"),
    "adapters-import-nodes": ("svdquant/adapters/a.py", "from ...nodes import sample", "direction"),
    "entry-skips-nodes": ("__init__.py", "from .svdquant.adapters import load", "direction"),
    "inside-a-function": ("svdquant/core/a.py", "def f():\n    from ..adapters import load", "direction"),
    "whole-room": ("svdquant/core/a.py", "from .. import adapters", "direction"),
    "core-imports-numpy": ("svdquant/core/a.py", "import numpy", "package"),
    "core-imports-comfy": ("svdquant/core/a.py", "import comfy.ops", "package"),
    "loader-imports-folder-paths": ("loaders/a.py", "import folder_paths", "package"),
    "quantizer-reads-files-itself": (
        "svdquant/quantizer/a.py",
        "from safetensors import safe_open",
        "package",
    ),
    "family-imports-comfy": ("svdquant/adapters/families/a.py", "from comfy import ops", "package"),
    "kernels-import-host-nodes": ("svdquant/kernels/a.py", "import nodes", "package"),
    "ours-by-absolute-name": ("nodes/a.py", "from svdquant.core import int4", "relative"),
    "ours-by-alias": ("loaders/a.py", "import svdquant_nodes.svdquant.core", "relative"),
    "pickle": ("loaders/a.py", "import pickle", "unsafe"),
    "torch-load": ("loaders/a.py", "import torch\nx = torch.load('a.pt', weights_only=True)", "unsafe"),
    "compiler-elsewhere": ("svdquant/kernels/a.py", "from torch.utils import cpp_extension", "compiler"),
    "long-file": ("svdquant/core/a.py", lines(401), "lines"),
    "long-family": ("svdquant/adapters/families/a.py", lines(121), "lines"),
    "long-function": ("svdquant/core/a.py", function("f", 61), "length of f"),
    "long-node-method": ("nodes/a.py", method("execute", 26), "length of execute"),
    "many-parameters": ("tools/a.py", function("f", 2, ELEVEN), "parameters of f"),
    "torch-in-a-kernel": ("csrc/a.cu", "#include <torch/library.h>\n", "torch"),
    "long-kernel": ("csrc/a.cu", "__global__ void k(int n) {\n" + "n;\n" * 200 + "}\n", "length of k"),
    "long-cu": ("csrc/a.cu", "//\n" * 601, "lines"),
}
ALLOWED = {
    "nodes-import-core": ("nodes/a.py", "from ..svdquant.core import int4"),
    "adapters-import-loaders": ("svdquant/adapters/a.py", "from ...loaders import detect"),
    "family-imports-its-table": ("svdquant/adapters/families/a.py", "from .table import Family"),
    "nodes-import-host-nodes": ("nodes/a.py", "import nodes\nimport comfy.utils"),
    "loader-imports-safetensors": ("loaders/a.py", "from safetensors import safe_open"),
    "compiler-in-its-place": ("svdquant/kernels/jit.py", "from torch.utils import cpp_extension"),
    "commands-import-all": ("tools/a.py", "from svdquant_nodes.svdquant.adapters import load\nimport numpy"),
    "schema-is-a-declaration": ("nodes/a.py", method("define_schema", 60)),
    "at-the-caps": ("svdquant/core/a.py", function("f", 60, ELEVEN.rpartition(",")[0]) + lines(340)),
}


@pytest.fixture
def house(tmp_path):
    """An empty pack with all its rooms."""
    rooms = ("core", "kernels", "adapters", "adapters/families", "quantizer")
    for folder in ("nodes", "loaders", "csrc", "tools", *(f"svdquant/{room}" for room in rooms)):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(("path", "text", "rule"), PLANTED.values(), ids=PLANTED)
def test_planted_breach_is_found(house, path, text, rule):
    (house / path).write_text(text)
    assert {finding.key for finding in findings(house)} == {f"{path}:{rule}"}


@pytest.mark.parametrize(("path", "text"), ALLOWED.values(), ids=ALLOWED)
def test_what_the_rules_allow(house, path, text):
    (house / path).write_text(text)
    assert findings(house) == []


def test_kernel_length_counts_nested_braces():
    text = "__global__ void\n__launch_bounds__(256) first(int* x) {\n  if (x) { x[0]; }\n}\n__global__ void second();\n"
    assert list(kernel_lengths(text)) == [("first", 4)]
