"""What every node's schema declares, read from the source: no ComfyUI is needed to know a node's inputs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svdquant_nodes.tools.pack import ROOT

DYNAMIC = r"\w*"  # what may stand for a part of a name that the code fills in


@dataclass(frozen=True)
class Input:
    """An input; `name` is a regular expression where the code fills in a part (`lora_name{suffix}`)."""

    name: str
    default: str | int | float | None

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.name, name) is not None


@dataclass(frozen=True)
class Schema:
    """One node: its id, its display name, its inputs, and its outputs by the name they show."""

    node_id: str
    display_name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]


def schemas() -> dict[str, Schema]:
    """Every node of nodes/ by its id."""
    found = [schema for file in (ROOT / "nodes").glob("*.py") for schema in read(file.read_text())]
    return {schema.node_id: schema for schema in found}


def read(source: str) -> Iterator[Schema]:
    """The schemas in one source file."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            calls = [call for part in _reachable(node, tree) for call in _calls(part)]
            for schema in (call for call in calls if _ends(call, "Schema")):
                words = {word.arg: word.value for word in schema.keywords}
                names = (ast.literal_eval(words["node_id"]), ast.literal_eval(words["display_name"]))
                inputs = dict.fromkeys(_input(call) for call in calls if _ends(call, "Input"))
                outputs = [_output(call) for call in _calls(schema) if _ends(call, "Output")]
                yield Schema(*names, tuple(inputs), tuple(outputs))


def constant(file: str, name: str) -> object:
    """The value of a module-level constant, `MORE = 4` for instance."""
    body = ast.parse((ROOT / file).read_text()).body
    assigned = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}
    return ast.literal_eval(assigned[name])


def _reachable(start: ast.ClassDef, tree: ast.Module) -> list[ast.AST]:
    """The class, and the functions and lists of its file and those beside it that it names, or that these name."""
    body = [*tree.body, *(node for file in _beside(tree) for node in ast.parse(file.read_text()).body)]
    shared = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    shared |= {n.target.id: n for n in body if isinstance(n, ast.AnnAssign)}
    shared |= {t.id: n for n in body if isinstance(n, ast.Assign) for t in n.targets}
    found, open_ends = [start], [start]
    while open_ends:
        names = {n.id for n in ast.walk(open_ends.pop()) if isinstance(n, ast.Name)}
        new = [shared[name] for name in names & shared.keys() if shared[name] not in found]
        found, open_ends = found + new, open_ends + new
    return found


def _beside(tree: ast.Module) -> list[Path]:
    """The files of nodes/ that a file of nodes/ takes names from."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [ROOT / "nodes" / f"{node.module}.py" for node in imports]


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]


def _ends(call: ast.Call, name: str) -> bool:
    return call.func.attr == name


def _input(call: ast.Call) -> Input:
    name = call.args[0]
    pieces = name.values if isinstance(name, ast.JoinedStr) else [name]
    texts = (re.escape(p.value) if isinstance(p, ast.Constant) else DYNAMIC for p in pieces)
    default = next((word.value for word in call.keywords if word.arg == "default"), None)
    return Input("".join(texts), default.value if isinstance(default, ast.Constant) else None)


def _output(call: ast.Call) -> str:
    return call.args[0].value if call.args else call.func.value.attr.upper()
