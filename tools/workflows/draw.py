"""A workflow in the two forms that ComfyUI knows: for its API, and for its page."""

from __future__ import annotations

import math
from typing import Any

from .graph import Link, Node, Workflow

COLUMN, WIDTH = 380, 320  # pixels between columns, width of a node
NOTE = "MarkdownNote"  # drawn by the page alone
UPLOADS = {"LoadImage": "image"}  # nodes to which the page adds a widget of its own after the file list
SEEDS = ("seed", "noise_seed")  # and inputs to which it adds what to do with them after a run
NOTE_WIDTH = 480


def api_form(workflow: Workflow) -> dict[str, Any]:
    """What POST /prompt takes."""
    nodes = workflow.graph()
    number = {name: str(i + 1) for i, name in enumerate(nodes)}
    return {
        number[name]: {
            "class_type": node.type,
            "inputs": {
                key: [number[value.name], value.output] if isinstance(value, Link) else value
                for key, value in node.inputs.items()
            },
        }
        # A page that opens this form names the other nodes itself, in its language.
        | ({"_meta": {"title": node.title}} if node.title else {})
        for name, node in nodes.items()
    }


def ui_form(workflow: Workflow, info: dict[str, Any]) -> dict[str, Any]:
    """What the page opens: nodes with places, sockets and widget values by position; links by number.

    info  the host's /object_info, for the order of inputs
    """
    nodes = workflow.graph()
    number = {name: i + 1 for i, name in enumerate(nodes)}
    drawn = {name: _draw(number[name], order, node, info) for order, (name, node) in enumerate(nodes.items())}
    links = _connect(nodes, number, drawn)
    return {
        "last_node_id": len(nodes) + 1,
        "last_link_id": len(links),
        "nodes": [*drawn.values(), _note(len(nodes) + 1, workflow, nodes)],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _connect(nodes: dict[str, Node], number: dict[str, int], drawn: dict[str, Any]) -> list[list[Any]]:
    links: list[list[Any]] = []
    for name, node in nodes.items():
        for slot, socket in enumerate(drawn[name]["inputs"]):
            source = node.inputs.get(socket["name"])
            if not isinstance(source, Link):
                continue
            output = drawn[source.name]["outputs"][source.output]
            links.append(
                [len(links) + 1, number[source.name], source.output, number[name], slot, output["type"]]
            )
            socket["link"] = len(links)
            output["links"].append(len(links))
    return links


def _draw(number: int, order: int, node: Node, info: dict[str, Any]) -> dict[str, Any]:
    signature = info[node.type]
    fields = {**signature["input"].get("required", {}), **signature["input"].get("optional", {})}
    sockets = [(key, spec) for key, spec in fields.items() if not _is_widget(spec)]
    properties: dict[str, Any] = {"Node name for S&R": node.type}
    if node.files:
        properties["models"] = [dict(name=f.name, url=f.url, directory=f.folder) for f in node.files]
    column, top, height = node.place
    return {
        "id": number,
        "type": node.type,
        "pos": [40 + column * COLUMN, 120 + top],
        "size": [WIDTH, height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [{"name": key, "type": spec[0], "link": None} for key, spec in sockets],
        "outputs": [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(signature["output_name"], signature["output"], strict=True)
        ],
        "title": node.title or signature["display_name"] or node.type,
        "properties": properties,
        "widgets_values": _widget_values(node, fields),
    }


def _note(number: int, workflow: Workflow, nodes: dict[str, Node]) -> dict[str, Any]:
    """What the workflow shows and where its files go, left of everything."""
    files = [f for node in nodes.values() for f in node.files]
    lines = [workflow.note]
    if files:
        lines += [
            "",
            f"**Files** ({math.fsum(f.size for f in files):.1f} GB), in ComfyUI's `models` folder:",
            "",
        ]
        lines += [f"- `{f.folder}`: [{f.name}]({f.url})" for f in files]
    return {
        "id": number,
        "type": NOTE,
        "pos": [-NOTE_WIDTH - 40, 120],
        "size": [NOTE_WIDTH, 220 + 40 * len(files)],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": workflow.shows,
        "properties": {},
        "widgets_values": ["\n".join(lines)],
    }


def _is_widget(spec: list[Any]) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if options.get("forceInput"):
        return False
    return (
        isinstance(kind, list)
        or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        or "DYNAMICCOMBO" in kind
    )


def _widget_values(node: Node, fields: dict[str, Any]) -> list[Any]:
    values = []
    for key, spec in fields.items():
        if not _is_widget(spec):
            continue
        options = spec[1] if len(spec) > 1 else {}
        values.append(node.inputs[key] if key in node.inputs else options["default"])
        if options.get("control_after_generate") or key in SEEDS:
            values.append("fixed")
    return [*values, UPLOADS[node.type]] if node.type in UPLOADS else values
