"""The node that folds LoRAs into a checkpoint."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders.detect import open_checkpoint
from ..svdquant.adapters import folders
from ..svdquant.adapters.baking import bake
from .checked import checked
from .lora_inputs import chosen, further_loras, lora_inputs
from .reported import reported


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
                "Fold LoRAs into a 4-bit checkpoint: a new file with more rank, nothing requantized. The new file can "
                "be baked again."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.names(folders.MODELS),
                    tooltip="A 4-bit checkpoint in models/diffusion_models, in any layout.",
                ),
                *lora_inputs(),
                io.String.Input(
                    "file_name",
                    default="my-baked-model",
                    tooltip="The file to write in models/diffusion_models.",
                ),
                io.Float.Input(
                    "largest_error",
                    default=0.01,
                    min=0.0,
                    max=0.5,
                    step=0.001,
                    tooltip="Of a layer's part of a LoRA that is not low-rank (DoRA, OFT, full differences), relative.",
                    optional=True,
                ),
                further_loras(),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was written, and what a branch cannot hold.",
                )
            ],
            is_output_node=True,
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(
        cls, model_name: str | None = None, lora_name: str | None = None, *, more: object = None
    ) -> bool | str:
        loras = checked(folders.LORAS, lora_name)
        models = checked(folders.MODELS, model_name, check=open_checkpoint)
        return loras if models is True else models

    @classmethod
    def execute(
        cls,
        model_name: str,
        lora_name: str,
        strength: float,
        file_name: str,
        largest_error: float = 0.01,
        more: dict | str | None = None,
        **others,
    ) -> io.NodeOutput:
        target = bake.new_file(folders.download_folder(folders.MODELS), file_name)
        baked = bake.bake(
            folders.find(folders.MODELS, model_name),
            chosen(lora_name, strength, more, others),
            target,
            rest=folders.download_folder(folders.LORAS) / f"{target.stem}-rest.safetensors",
            limit=largest_error,
            progress=folders.show_progress(),
        )
        return reported(str(baked), text=str(baked), event=f"wrote {target}")
