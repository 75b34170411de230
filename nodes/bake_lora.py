"""The node that folds a LoRA into a checkpoint."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..svdquant.adapters import bake, folders


class SVDQuantBakeLora(io.ComfyNode):
    """Files in, a wider file out; nothing is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantBakeLora",
            display_name="SVDQuant Bake LoRA",
            category="SVDQuant",
            search_aliases=["merge lora", "save lora into model", "nunchaku lora", "fuse lora"],
            description=(
                "Fold a LoRA into a 4-bit Nunchaku checkpoint: a new file with more rank, exact, nothing requantized. "
                "The new file can be baked again."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.names(folders.MODELS),
                    tooltip="A Nunchaku checkpoint in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=folders.names(folders.LORAS),
                    tooltip="A LoRA in models/loras, in any naming.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Fixed in the new file; negative values turn the LoRA's effect around.",
                ),
                io.String.Input(
                    "file_name",
                    default="my-baked-model",
                    tooltip="The file to write in models/diffusion_models.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was written, and what a branch cannot hold.",
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model_name: str, lora_name: str, strength: float, file_name: str) -> io.NodeOutput:
        target = bake.new_file(folders.download_folder(folders.MODELS), file_name)
        baked = bake.bake(
            folders.find(folders.MODELS, model_name),
            [(folders.find(folders.LORAS, lora_name), strength)],
            target,
            rest=folders.download_folder(folders.LORAS) / f"{target.stem}-rest.safetensors",
            progress=folders.show_progress(),
        )
        return io.NodeOutput(str(baked), ui=ui.PreviewText(str(baked)))
