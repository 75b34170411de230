"""A small picture of a graph for the list of templates: its nodes where they lie, ours filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pack import ROOT
from .graph import Workflow

SIZE, EDGE, TITLE = (480, 320), 24, 56
PAPER, LINE, OTHERS, OURS, INK = "#1d2228", "#66717d", "#39424c", "#2f7d6d", "#f2f4f5"


def save(drawn: dict[str, Any], workflow: Workflow, path: Path) -> None:
    """Draw a workflow in the page's form as a JPEG, with its picture, if it has one, in place of the last node."""
    from PIL import Image, ImageDraw, ImageFont

    nodes = {node["id"]: node for node in drawn["nodes"] if node["type"] != "MarkdownNote"}
    place = _fit(list(nodes.values()))
    image = Image.new("RGB", SIZE, PAPER)
    pen = ImageDraw.Draw(image)
    for _, source, _, target, slot, _ in drawn["links"]:
        a, b = place(nodes[source]), place(nodes[target])
        pen.line([(a[2], a[1] + 5), (b[0], b[1] + 5 + 2 * slot)], fill=LINE)
    for node in nodes.values():
        pen.rounded_rectangle(place(node), 4, fill=OURS if node["type"].startswith("SVDQuant") else OTHERS)
    if workflow.picture:
        file, part = workflow.picture
        left, top, right, _ = map(round, place(next(n for n in nodes.values() if n["type"] == "SaveImage")))
        shown = Image.open(ROOT / file).convert("RGB").crop(part)
        image.paste(shown.resize((right - left, right - left)), (left, top))
    pen.text((EDGE, 14), workflow.name, fill=INK, font=ImageFont.load_default(26))
    image.save(path, quality=85, optimize=True)


def _fit(nodes: list[dict[str, Any]]):
    """A function from a node to its rectangle in the picture."""
    left, top = (min(node["pos"][i] for node in nodes) for i in (0, 1))
    wide, tall = (max(node["pos"][i] + node["size"][i] for node in nodes) for i in (0, 1))
    room = (SIZE[0] - 2 * EDGE, SIZE[1] - TITLE - EDGE)
    scale = min(room[0] / (wide - left), room[1] / (tall - top))

    def place(node: dict[str, Any]) -> tuple[float, float, float, float]:
        x, y = EDGE + (node["pos"][0] - left) * scale, TITLE + (node["pos"][1] - top) * scale
        return x, y, x + node["size"][0] * scale, y + node["size"][1] * scale

    return place
