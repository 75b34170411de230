"""The node that loads a 4-bit checkpoint."""

from __future__ import annotations

from comfy_api.latest import io

from ..svdquant.adapters import folders, load


class SVDQuantLoadModel(io.ComfyNode):
    """File in, MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                    options=folders.names(folders.MODELS),
                    tooltip=(
                        "A checkpoint in models/diffusion_models. Precision, rank and family are read from the file. "
                        "For a two-file folder choose its transformer_blocks.safetensors."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="An ordinary MODEL; ComfyUI decides the device and offloading.")
            ],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(load.load_model(folders.find(folders.MODELS, model_name)))
