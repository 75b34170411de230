"""The node that loads a 4-bit checkpoint."""

from __future__ import annotations

import re

from comfy_api.latest import io

from ..loaders.detect import open_checkpoint
from ..svdquant.adapters import activations as widths
from ..svdquant.adapters import folders, load
from .checked import checked, fingerprint

# How 4-bit files are mostly named; the first of them is what a new node shows.
FOUR_BIT = re.compile(r"int4|fp4|svdq-", re.IGNORECASE)


class SVDQuantLoadModel(io.ComfyNode):
    """File in, MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folders.names(folders.MODELS)
        return io.Schema(
            node_id="SVDQuantLoadModel",
            display_name="SVDQuant Load Model",
            category="SVDQuant",
            search_aliases=[
                "nunchaku",
                "svdq",
                "int4",
                "nvfp4",
                "4-bit",
                "DiT loader",
                "load diffusion model",
            ],
            description=(
                "Load a 4-bit SVDQuant checkpoint (Nunchaku, comfy-kitchen, diffusers nunchaku_lite) as an ordinary "
                "model: samplers, LoRA loaders, ControlNets and hooks work on it."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files,
                    default=next(filter(FOUR_BIT.search, files), None),
                    tooltip=(
                        "A checkpoint in models/diffusion_models. Precision, rank and family are read from the file. "
                        "For a two-file folder choose its transformer_blocks.safetensors."
                    ),
                ),
                io.Combo.Input(
                    "activations",
                    options=list(widths.CHOICES),
                    default="auto",
                    optional=True,
                    tooltip=(
                        "8 bit is closer to the 16-bit model and takes twice the memory of 4 bit, half of 16 bit. "
                        "auto takes 8 bit where that is faster (A100, H100, H200, B200), else 4 bit."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="An ordinary MODEL; ComfyUI decides the device and offloading.")
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return checked(folders.MODELS, model_name, check=open_checkpoint)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **_: object) -> object:
        return fingerprint(folders.MODELS, model_name)

    @classmethod
    def execute(cls, model_name: str, activations: str = "auto") -> io.NodeOutput:
        path = folders.find(folders.MODELS, model_name)
        return io.NodeOutput(load.load_model(path, activations=activations))
