"""The node that says what a checkpoint is."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..loaders.detect import open_checkpoint
from ..svdquant.adapters import folders, report
from .checked import checked, fingerprint
from .reported import reported


class SVDQuantInspect(io.ComfyNode):
    """File in, text out; nothing is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantInspect",
            display_name="SVDQuant Inspect",
            category="SVDQuant",
            search_aliases=["nunchaku info", "checkpoint info", "svdq info", "metadata"],
            description="Show a 4-bit checkpoint's dialect, family and layers, and how each layer will be computed.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[*folders.names(folders.MODELS), *folders.names(folders.TEXT_ENCODERS)],
                    tooltip="A checkpoint or text encoder; only its header is read.",
                ),
            ],
            outputs=[io.String.Output("report", display_name="report", tooltip="One line a layer.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return checked(folders.kind_of(model_name), model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None) -> object:
        return fingerprint(folders.kind_of(model_name), model_name)

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        described = report.describe(open_checkpoint(folders.find(folders.kind_of(model_name), model_name)))
        device = comfy.model_management.get_torch_device()
        text = f"{report.as_text(described)}\n{report.computed_by(described, device)}"
        return reported(text, text=text)
