"""The node that makes a 4-bit text encoder of a 16-bit one."""

from __future__ import annotations

import time

from comfy_api.latest import io

from ..loaders.source import open_source
from ..svdquant.adapters import folders
from ..svdquant.adapters.quantizing import quantize as host
from ..svdquant.quantizer import report, text_encoder
from .reported import reported


class SVDQuantQuantizeTextEncoder(io.ComfyNode):
    """File in, smaller file out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantQuantizeTextEncoder",
            display_name="SVDQuant Quantize Text Encoder",
            category="SVDQuant/quantize",
            search_aliases=["quantize t5", "t5xxl int4", "awq", "make 4-bit text encoder"],
            description=(
                "Quantize a T5-XXL to 4 bits, in the layout of Nunchaku's text encoder, and write it to "
                "models/text_encoders. It needs no calibration and takes minutes."
            ),
            inputs=[
                io.Combo.Input(
                    "source",
                    options=folders.names(folders.TEXT_ENCODERS),
                    tooltip="The T5-XXL: fp16, bf16, fp32 or fp8, as t5xxl files are named.",
                ),
                io.String.Input("file_name", default="t5xxl-int4", tooltip="In models/text_encoders."),
            ],
            outputs=[
                io.String.Output("path", display_name="path", tooltip="The file that was written."),
                io.String.Output(
                    "report", display_name="report", tooltip="Size, time and the error of every linear."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, source: str, file_name: str) -> io.NodeOutput:
        began, target = time.perf_counter(), host.target(file_name, folders.TEXT_ENCODERS)
        encoder = open_source(folders.find(folders.TEXT_ENCODERS, source))
        errors = text_encoder.quantize(encoder, target, device=host.device(), progress=host.progress())
        text = report.as_text(target, errors, time.perf_counter() - began, measured=False)
        return reported(str(target), text, text=text)
