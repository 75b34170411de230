"""Help pages and the Chinese translation agree with the nodes, and quote messages that the code has."""

from __future__ import annotations

import ast
import json
import re

import pytest

from svdquant_nodes.tests import node_schemas
from svdquant_nodes.tools.pack import ROOT

SCHEMAS = node_schemas.schemas()
PAGES = {page.stem: page for page in sorted((ROOT / "web" / "docs").rglob("*.md"))}
HEADINGS = ["Inputs", "Outputs", "Example", "When something goes wrong"]
CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))

WITH_FURTHER_LORAS = ("SVDQuantApplyLora", "SVDQuantBakeLora")
every_node = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)


def sections(node):
    """A page's title with its first paragraph, and the text under each heading."""
    head, *parts = re.split(r"^## ", PAGES[node].read_text(encoding="utf-8"), flags=re.MULTILINE)
    return head, {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def rows(text):
    """The cells of every table row that begins with a name or message in backticks."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def names(cell):
    return re.findall(r"`(\w+)`", cell)


class TestSchemas:
    """The reader itself, on a source with everything it must follow."""

    SOURCE = """
COUNT = 2
SETTINGS: list = [io.Int.Input("seed", default=0)]
def _more(suffix=""):
    return [io.Combo.Input(f"name{suffix}"), io.Float.Input(f"by{suffix}", default=1.0)]
class Node(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        options = [io.DynamicCombo.Option(str(n), _more(f"_{n}")) for n in range(COUNT)]
        return io.Schema(node_id="N", display_name="A Node", inputs=[io.Model.Input("model"), *SETTINGS,
            io.DynamicCombo.Input("more", options=options)], outputs=[io.Model.Output(), io.String.Output("report")])
"""

    def test_inputs_are_followed_into_lists_and_functions(self):
        [schema] = node_schemas.read(self.SOURCE)
        defaults = {one.name: one.default for one in schema.inputs}
        assert defaults == {"model": None, "more": None, "seed": 0, r"name\w*": None, r"by\w*": 1.0}
        assert schema.outputs == ("MODEL", "report")

    def test_filled_in_names_match(self):
        [schema] = node_schemas.read(self.SOURCE)
        assert [one.name for one in schema.inputs if one.matches("name_2")] == [r"name\w*"]


def test_every_page_belongs_to_a_node_and_every_node_has_one():
    assert set(PAGES) == set(SCHEMAS)


@every_node
def test_page_has_the_headings_of_all_pages(schema):
    head, parts = sections(schema.node_id)
    assert list(parts) == HEADINGS
    title, sentence = head.strip().split("\n\n")
    assert title == f"# {schema.display_name}"
    assert sentence.endswith(".") and sentence.count(". ") == 0


@every_node
def test_page_names_every_input_and_its_default(schema):
    _, parts = sections(schema.node_id)
    told = [(name, cells[2]) for cells in rows(parts["Inputs"]) for name in names(cells[0])]
    for declared in schema.inputs:
        defaults = {default for name, default in told if declared.matches(name)}
        assert defaults == {shown(declared.default)}, declared.name
    known = [name for name, _ in told if any(declared.matches(name) for declared in schema.inputs)]
    assert known == [name for name, _ in told]


def shown(default):
    if default is None:
        return "—"
    return f"{default:g}" if isinstance(default, float) else str(default) or "empty"


@pytest.mark.parametrize("node", WITH_FURTHER_LORAS)
def test_page_names_every_further_lora(node):
    count = node_schemas.constant("nodes/lora_inputs.py", "MORE")
    told = {name for cells in rows(sections(node)[1]["Inputs"]) for name in names(cells[0])}
    wanted = {f"{name}_{k + 2}" for k in range(count) for name in ("lora_name", "strength")}
    assert {name for name in told if re.search(r"_\d$", name)} == wanted
    assert f"0 to {count}" in sections(node)[1]["Inputs"]


@every_node
def test_page_names_every_output(schema):
    told = [name for cells in rows(sections(schema.node_id)[1]["Outputs"]) for name in names(cells[0])]
    assert told == list(schema.outputs)


@every_node
def test_links_work_inside_comfyui(schema):
    """It serves the pages, not the files of the pack around them."""
    text = PAGES[schema.node_id].read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []


def strings_of_the_code():
    """Every piece of text that the pack can say: an f-string gives the pieces between its values."""
    files = [file for room in ("nodes", "loaders", "svdquant") for file in (ROOT / room).rglob("*.py")]
    trees = (ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for file in files)
    return {
        word.value
        for tree in trees
        for word in tree
        if isinstance(word, ast.Constant) and isinstance(word.value, str)
    }


@every_node
def test_page_quotes_messages_that_the_code_has(schema):
    messages = [cells[0] for cells in rows(sections(schema.node_id)[1]["When something goes wrong"])]
    quoted = [re.match(r"`([^`]+)`", message).group(1) for message in messages]
    assert quoted
    texts = strings_of_the_code()
    pieces = [piece.strip() for message in quoted for piece in message.split("…") if piece.strip()]
    assert [piece for piece in pieces if not any(piece in text for text in texts)] == []


@every_node
def test_chinese_has_the_same_inputs_and_outputs(schema):
    node = CHINESE[schema.node_id]
    translated = [name.removeprefix("more_") for name in node["inputs"]]
    for declared in schema.inputs:
        assert any(declared.matches(name) for name in translated), declared.name
    assert all(any(d.matches(name) for d in schema.inputs) for name in translated)
    assert list(node["outputs"]) == [str(index) for index in range(len(schema.outputs))]


@every_node
def test_chinese_is_complete_and_shown_as_it_is(schema):
    node = CHINESE[schema.node_id]
    slots = [*node["inputs"].values(), *node["outputs"].values()]
    texts = [node["display_name"], node["description"], *(slot[key] for slot in slots for key in slot)]
    assert all(set(slot) == {"name", "tooltip"} for slot in slots)
    assert not re.search("[{}@|]", "".join(texts))  # the page's translator would take these for its own
    assert all(re.search("[\u4e00-\u9fff]", text) for text in [node["description"], *texts[3::2]])


@pytest.mark.parametrize("node", WITH_FURTHER_LORAS)
def test_chinese_has_every_further_lora(node):
    count = node_schemas.constant("nodes/lora_inputs.py", "MORE")
    further = {name for name in CHINESE[node]["inputs"] if name.startswith("more_")}
    # the page writes the dot of more.lora_name_2 as an underscore
    assert further == {f"more_{name}_{k + 2}" for k in range(count) for name in ("lora_name", "strength")}


def test_chinese_has_no_other_node():
    assert set(CHINESE) == set(SCHEMAS)
