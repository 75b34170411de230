"""The files around the code agree with it and with each other."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from svdquant_nodes.tests.node_ids import NODE_IDS
from svdquant_nodes.tools.pack import ROOT

# Nodes of ComfyUI that our workflows may use; tests/host asks each supported host whether it has them.
STOCK_NODES = {
    "BasicGuider",
    "BasicScheduler",
    "CLIPLoader",
    "CLIPTextEncode",
    "Canny",
    "CheckpointLoaderSimple",
    "ConditioningZeroOut",
    "ControlNetApplyAdvanced",
    "ControlNetLoader",
    "DifferentialDiffusion",
    "DualCLIPLoader",
    "EmptyLatentImage",
    "EmptySD3LatentImage",
    "FluxGuidance",
    "FluxKontextImageScale",
    "ImageScaleBy",
    "InpaintModelConditioning",
    "KSampler",
    "KSamplerSelect",
    "LoadImage",
    "LoraLoaderModelOnly",
    "ModelSamplingAuraFlow",
    "ModelSamplingFlux",
    "PreviewImage",
    "RandomNoise",
    "ReferenceLatent",
    "SamplerCustomAdvanced",
    "SaveImage",
    "TextEncodeQwenImageEditPlus",
    "UNETLoader",
    "VAEDecode",
    "VAEDecodeTiled",
    "VAEEncode",
    "VAELoader",
}
PAGE_ONLY = {
    "MarkdownNote",
    "Note",
    "PrimitiveNode",
    "Reroute",
}  # drawn by the frontend, never sent to the host
WORKFLOWS = sorted((ROOT / "workflows").rglob("*.json"))

# A path of one machine, or a mark that says "not finished".
FORBIDDEN = {
    "path of a machine": re.compile(r"(?<![\w.~}-])/(?:home|root|work|opt|Users|tmp)/\w"),
    "task without an issue": re.compile(r"\b(?:TODO|FIXME|XXX)\b(?!\(#\d+\))"),
    "conflict mark": re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE),
}


def tracked():
    """Files that git knows or would take, without those of the licence and of binary kinds."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def text_of(name):
    """A file's text, or nothing where it is binary."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def project_list(name):
    """A list of strings in pyproject.toml, for a Python that has no TOML reader."""
    block = re.search(
        rf"^{name} = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    return set(re.findall(r'"([^"]+)"', block.group(1)))


def test_requirements_are_those_of_the_project():
    requirements = set((ROOT / "requirements.txt").read_text().split())
    assert requirements == project_list("dependencies")
    assert not any(line.startswith("torch") for line in requirements)


def test_changelog_leads_with_the_next_or_the_current_version():
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert newest in ("Unreleased", version)


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_no_file_holds(rule):
    ourselves = Path(__file__).relative_to(ROOT).as_posix()
    texts = {name: text_of(name) for name in tracked() if name != ourselves}
    assert [name for name, text in texts.items() if FORBIDDEN[rule].search(text)] == []


@pytest.mark.parametrize(
    ("rule", "line", "found"),
    [
        ("path of a machine", "see /home/me/models", True),
        ("path of a machine", "(/tmp/x)", True),
        ("path of a machine", "https://example.org/home/page", False),
        ("path of a machine", "models/work/x", False),
        ("task without an issue", "# TODO later", True),
        ("task without an issue", "# TODO(#12) later", False),
    ],
)
def test_forbidden_words_are_found(rule, line, found):
    assert bool(FORBIDDEN[rule].search(line)) is found


def node_types(workflow):
    """The node ids of a workflow, in API form or as the page saves it."""
    if "nodes" in workflow:
        return {node["type"] for node in workflow["nodes"]}
    return {node["class_type"] for node in workflow.values()}


def test_there_is_a_demo_in_both_forms():
    names = {file.relative_to(ROOT / "workflows").as_posix() for file in WORKFLOWS}
    assert {"demo.json", "api/demo.json"} <= names


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.relative_to(ROOT / "workflows").as_posix())
def test_workflow_uses_nodes_that_exist(file):
    workflow = json.loads(file.read_text())
    assert node_types(workflow) - STOCK_NODES - PAGE_ONLY - NODE_IDS == set()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.relative_to(ROOT / "workflows").as_posix())
def test_workflow_links_lead_somewhere(file):
    workflow = json.loads(file.read_text())
    if "nodes" in workflow:
        nodes = {node["id"] for node in workflow["nodes"]}
        ends = {end for link in workflow["links"] for end in (link[1], link[3])}
    else:
        nodes = set(workflow)
        inputs = [value for node in workflow.values() for value in node["inputs"].values()]
        ends = {value[0] for value in inputs if isinstance(value, list)}
    assert ends <= nodes


def tree_lines():
    """The lines of the file tree in docs/architecture.md: the fenced block that begins with `__init__.py`."""
    told = (ROOT / "docs" / "architecture.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", told, re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if block.startswith("__init__.py")).splitlines()


def tree_paths(lines):
    """Paths of an annotated tree: names, two blanks, a note; two more blanks of indent = inside the folder above.

    __init__.py      the entry
    svdquant/        the engine
      core/          the mathematics
      kernels/ ...
    """
    folders, paths = {0: Path()}, []
    for line in filter(str.strip, lines):
        indent = len(line) - len(line.lstrip())
        parent = folders[max(depth for depth in folders if depth <= indent)]
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            paths.append((parent / name).as_posix())
            if name.endswith("/"):
                folders = {depth: f for depth, f in folders.items() if depth <= indent} | {
                    indent + 1: parent / name
                }
    return paths


def test_the_told_tree_is_the_tree_on_disk():
    paths = tree_paths(tree_lines())
    missing = [path for path in paths if not list(ROOT.glob(path))]
    assert missing == []


def test_the_told_tree_leaves_nothing_out():
    named = set(tree_paths(tree_lines()))
    inside = ("svdquant", "nodes", "loaders", "tools")
    files = {name for name in tracked() if not name.startswith(".")}
    top = {name.split("/")[0] for name in files}
    below = {"/".join(name.split("/")[:2]) for name in files if name.split("/")[0] in inside and "/" in name}
    unnamed = {path for path in top | below if not any(Path(path).match(pattern) for pattern in named)}
    assert {path for path in unnamed if not path.endswith("__init__.py") or "/" not in path} == set()


def test_tree_paths_reads_an_annotated_tree():
    lines = [
        "__init__.py  the entry",
        "a/ b/        two folders",
        "c/",
        "  d.py e.py  files",
        "  f/",
        "    g.py",
        "h.md",
    ]
    assert tree_paths(lines) == ["__init__.py", "a", "b", "c", "c/d.py", "c/e.py", "c/f", "c/f/g.py", "h.md"]
