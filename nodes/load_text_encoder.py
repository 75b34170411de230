"""The node that loads 4-bit text encoders."""

from __future__ import annotations

from comfy_api.latest import io

from ..svdquant.adapters import encoder_types, folders, text_encoder
from .checked import checked, fingerprint

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
            search_aliases=[
                "nunchaku",
                "t5xxl",
                "qwen",
                "gemma",
                "awq",
                "int4",
                "DualCLIPLoader",
                "CLIP loader",
            ],
            description=(
                "Load 4-bit text encoders (T5, UMT5, Qwen, Gemma, Llama, Mistral), with others beside them where the "
                "model wants several, as an ordinary CLIP: text encode nodes, LoRA loaders and hooks work on it. "
                "About a third of the 16-bit encoder's size."
            ),
            inputs=[
                io.Combo.Input(
                    "text_encoder1",
                    options=files,
                    tooltip="A file in models/text_encoders: the 4-bit one or, where there are several, any of them.",
                ),
                io.Combo.Input(
                    "text_encoder2",
                    options=[NONE, *files],
                    default="none",
                    tooltip="The second file, in any order; for FLUX.1, CLIP-L. none for models with one encoder.",
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
                    options=encoder_types.available(),
                    default="flux",
                    tooltip=(
                        "The model the prompt is for, as in ComfyUI's CLIP loaders: flux for FLUX.1, flux2 for FLUX.2, "
                        "qwen_image, wan, and lumina2 for Z-Image, too."
                    ),
                ),
                *_settings([NONE, *files]),
            ],
            outputs=[io.Clip.Output(tooltip="An ordinary CLIP; ComfyUI decides about offloading.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        text_encoder1: str | None = None,
        text_encoder2: str | None = None,
        text_encoder3: str | None = None,
        text_encoder4: str | None = None,
    ) -> bool | str:
        named = (text_encoder1, text_encoder2, text_encoder3, text_encoder4)
        return checked(folders.TEXT_ENCODERS, *(name for name in named if name != NONE))

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> object:
        return fingerprint(folders.TEXT_ENCODERS, inputs)

    @classmethod
    def execute(
        cls,
        text_encoder1,
        text_encoder2,
        type,
        text_encoder3=NONE,
        text_encoder4=NONE,
        t5_min_length=0,
        device="default",
    ) -> io.NodeOutput:
        named = (text_encoder1, text_encoder2, text_encoder3, text_encoder4)
        paths = tuple(folders.find(folders.TEXT_ENCODERS, name) for name in named if name != NONE)
        return io.NodeOutput(text_encoder.load_clip(text_encoder.Request(paths, type, device, t5_min_length)))


def _settings(files: list[str]) -> list[io.Input]:
    """What few need. New ones come last: the page keeps values by position."""
    return [
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
            tooltip="cpu keeps the encoders out of GPU memory; they are slower there.",
        ),
        io.Combo.Input(
            "text_encoder4",
            options=files,
            default="none",
            optional=True,
            advanced=True,
            tooltip="The fourth file, for HiDream with all of its encoders.",
        ),
    ]
