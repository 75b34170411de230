"""The page about the workflows: what each shows, and what it asks of a machine."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .graph import Workflow

AROUND = 2.0  # GB that activations take beside a model, at one megapixel
HEAD = """# Workflows

In ComfyUI: *Workflow → Browse Templates → svdquant-nodes*. Without a page: POST a file of [`api/`](api) to ComfyUI's
`/prompt`. Each has a note that says what to change first and where its files go.

| template | shows | download, GB | VRAM, GB |
| --- | --- | --- | --- |
"""
FOOT = """
*Download* counts every file once, text encoders and VAE included; many workflows share them. *VRAM* is an estimate, not
a measurement: the diffusion model with LoRA or ControlNet, and 2 GB a megapixel for activations. Text encoders
leave the GPU before sampling. ComfyUI keeps what does not fit in RAM, which is slower. The image editing workflows
start with ComfyUI's own `example.png`.

`tools/make_workflows.py` writes everything here from the descriptions in `tools/workflows/`.
"""


def text(workflows: Iterable[Workflow]) -> str:
    """The page, as markdown."""
    return HEAD + "".join(f"| {' | '.join(_cells(workflow))} |\n" for workflow in workflows) + FOOT


def _cells(workflow: Workflow) -> tuple[str, ...]:
    files = dict.fromkeys(f for node in workflow.graph().values() for f in node.files)
    models = [f.size for f in files if f.folder == "diffusion_models"] + [size for _, size in workflow.made]
    beside = sum(f.size for f in files if f.folder in ("loras", "controlnet"))
    sizes = [node.inputs for node in workflow.graph().values() if {"width", "height"} <= node.inputs.keys()]
    megapixels = max((size["width"] * size["height"] / 2**20 for size in sizes), default=1)
    download = f"{math.fsum(f.size for f in files):.1f}" if files else "nothing"
    memory = str(math.ceil(max(models) + beside + AROUND * megapixels)) if models else "none needed"
    return f"[{workflow.name}]({workflow.name}.json)", workflow.shows, download, memory
