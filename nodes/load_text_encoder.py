"""The node that loads a 4-bit text encoder."""

from __future__ import annotations

from comfy_api.latest import io

from ..svdquant.adapters import folders, text_encoder

NONE = "none"


class SVDQuantLoadTextEncoder(io.ComfyNode):
    """Files in, CLIP out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folders.names(folders.TEXT_ENCODERS)
        return io.Schema(
            node_id="SVDQuantLoadTextEncoder",
            display_name="SVDQuant Load Text Encoder",
            category="SVDQuant",
            search_aliases=["nunchaku", "t5xxl", "awq", "int4", "4-bit T5", "DualCLIPLoader", "CLIP loader"],
            description=(
                "Load a 4-bit T5-XXL (Nunchaku AWQ), with CLIP-L beside it where the model wants both, as an ordinary "
                "CLIP: text encode nodes, LoRA loaders and hooks work on it. A third of the 16-bit encoder's size."
            ),
            inputs=[
                io.Combo.Input(
                    "text_encoder1",
                    options=files,
                    tooltip="A file in models/text_encoders: the 4-bit T5 or, for two encoders, the other one.",
                ),
                io.Combo.Input(
                    "text_encoder2",
                    options=[NONE, *files],
                    default="none",
                    tooltip="The second file, in either order; for FLUX.1, CLIP-L. none for models that use T5 alone.",
                ),
                io.Combo.Input(
                    "text_encoder3",
                    options=[NONE, *files],
                    default="none",
                    optional=True,
                    advanced=True,
                    tooltip="The third file, for SD3 with CLIP-L and CLIP-G.",
                ),
                io.Combo.Input(
                    "type",
                    options=list(text_encoder.KINDS),
                    default="flux",
                    tooltip="The model the prompt is for. flux needs CLIP-L and T5, the others take T5 alone.",
                ),
                io.Int.Input(
                    "t5_min_length",
                    default=0,
                    min=0,
                    max=1024,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Prompts are padded to so many T5 tokens. 0: the model's own, 256 for FLUX.1.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="cpu keeps the encoder out of GPU memory; it is slower there.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="An ordinary CLIP; ComfyUI decides about offloading.")],
        )

    @classmethod
    def execute(
        cls, text_encoder1, text_encoder2, type, text_encoder3=NONE, t5_min_length=0, device="default"
    ) -> io.NodeOutput:
        chosen = [name for name in (text_encoder1, text_encoder2, text_encoder3) if name != NONE]
        paths = tuple(folders.find(folders.TEXT_ENCODERS, name) for name in chosen)
        return io.NodeOutput(text_encoder.load_clip(text_encoder.Request(paths, type, device, t5_min_length)))
