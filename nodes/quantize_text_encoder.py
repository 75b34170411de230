"""The node that makes a 4-bit text encoder of a 16-bit one."""

from __future__ import annotations

import time

from comfy_api.latest import io

from ..loaders.source import open_source
from ..svdquant.adapters import folders
from ..svdquant.adapters.quantizing import quantize as host
from ..svdquant.quantizer import report, text_encoder
from .checked import checked
from .reported import reported


class SVDQuantQuantizeTextEncoder(io.ComfyNode):
    """File in, smaller file out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantQuantizeTextEncoder",
            display_name="SVDQuant Quantize Text Encoder",
            category="SVDQuant/quantize",
            search_aliases=["quantize t5", "t5xxl int4", "qwen", "gemma", "awq", "make 4-bit text encoder"],
            description=(
                "Quantize a text encoder to 4 bits: T5 and UMT5, Qwen3, Qwen2.5-VL, Qwen3-VL, Gemma 2 and 3, Llama, "
                "Mistral. It needs no calibration, takes minutes and writes to models/text_encoders."
            ),
            inputs=[
                io.Combo.Input(
                    "source",
                    options=folders.names(folders.TEXT_ENCODERS),
                    tooltip="The encoder in fp16, bf16, fp32 or fp8, as ComfyUI's own CLIP loaders take it.",
                ),
                io.String.Input("file_name", default="text-encoder-int4", tooltip="In models/text_encoders."),
                io.Combo.Input(
                    "group",
                    options=[str(group) for group in text_encoder.GROUPS],
                    default="128",
                    optional=True,
                    advanced=True,
                    tooltip="Columns that share a scale. 64: a tenth less error, 6 % larger.",
                ),
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
    def validate_inputs(cls, source: str | None = None) -> bool | str:
        return checked(folders.TEXT_ENCODERS, source, check=open_source)

    @classmethod
    def execute(cls, source: str, file_name: str, group: str = "128") -> io.NodeOutput:
        began, target = time.perf_counter(), host.target(file_name, folders.TEXT_ENCODERS)
        encoder = open_source(folders.find(folders.TEXT_ENCODERS, source))
        errors = text_encoder.quantize(
            encoder, target, group=int(group), device=host.device(), progress=host.progress()
        )
        seconds = time.perf_counter() - began
        text = report.as_text(target, errors, seconds, measured=False)
        return reported(str(target), text, text=text, event=f"wrote {target} in {seconds:.1f} s")
