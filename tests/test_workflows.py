"""The files of workflows/ are what tools/workflows/ describes, complete and tidy."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from svdquant_nodes.tools.pack import ROOT
from svdquant_nodes.tools.workflows import WORKFLOWS, draw, page

FOLDER = ROOT / "workflows"
TITLE_BAR = 40  # pixels above a node's place
every_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)


def drawn(workflow):
    return json.loads((FOLDER / f"{workflow.name}.json").read_text(encoding="utf-8"))


def note_of(workflow):
    [note] = [node for node in drawn(workflow)["nodes"] if node["type"] == draw.NOTE]
    return note


def test_every_file_has_a_description():
    names = {workflow.name for workflow in WORKFLOWS}
    assert len(names) == len(WORKFLOWS)
    for folder, kind in ((FOLDER, "json"), (FOLDER / "api", "json"), (FOLDER, "jpg")):
        assert {file.stem for file in folder.glob(f"*.{kind}")} == names


@every_workflow
def test_api_form_is_up_to_date(workflow):
    file = FOLDER / "api" / f"{workflow.name}.json"
    assert json.loads(file.read_text(encoding="utf-8")) == draw.api_form(workflow)


def test_page_is_up_to_date():
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == page.text(WORKFLOWS)


@every_workflow
def test_both_forms_have_the_same_nodes_and_links(workflow):
    graph, nodes = drawn(workflow), draw.api_form(workflow)
    types = {str(node["id"]): node["type"] for node in graph["nodes"] if node["type"] != draw.NOTE}
    assert types == {number: node["class_type"] for number, node in nodes.items()}
    sockets = {node["id"]: [socket["name"] for socket in node["inputs"]] for node in graph["nodes"]}
    links = {
        (str(target), sockets[target][slot]): [str(source), output]
        for _, source, output, target, slot, _ in graph["links"]
    }
    assert links == {
        (number, name): value
        for number, node in nodes.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }


@every_workflow
def test_nodes_do_not_overlap(workflow):
    boxes = [
        (node["title"], *node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for node in drawn(workflow)["nodes"]
    ]
    overlapping = [
        (a, b)
        for (a, left, top, right, bottom), (b, x0, y0, x1, y1) in combinations(boxes, 2)
        if left < x1 and x0 < right and top - TITLE_BAR < y1 and y0 - TITLE_BAR < bottom
    ]
    assert overlapping == []


@every_workflow
def test_the_note_is_three_to_six_sentences_and_names_every_file(workflow):
    sentences = re.findall(r"[^.]+\.(?=\s|$)", workflow.note)
    assert 3 <= len(sentences) <= 6
    text = note_of(workflow)["widgets_values"][0]
    assert text.startswith(workflow.note)
    for file in (file for node in workflow.graph().values() for file in node.files):
        assert file.url in text


@every_workflow
def test_a_file_that_is_loaded_can_be_downloaded_or_made(workflow):
    """The page offers what stands in `properties.models`; the rest is in the pack or made by another workflow."""
    made = {
        f"{node.inputs['file_name']}.safetensors"
        for other in WORKFLOWS
        for node in other.graph().values()
        if node.type in ("SVDQuantQuantize", "SVDQuantQuantizeTextEncoder")
    }
    shipped = {file.name for file in (ROOT / "demo").rglob("*.safetensors")}
    offered = {
        model["name"] for node in drawn(workflow)["nodes"] for model in node["properties"].get("models", ())
    }
    loaded = {
        value
        for node in workflow.graph().values()
        for value in node.inputs.values()
        if isinstance(value, str) and value.endswith(".safetensors")
    }
    assert {name for name, _ in workflow.made} <= made
    assert loaded <= offered | shipped | {name for name, _ in workflow.made}
