"""The node that brings a published checkpoint into ComfyUI's model folder."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders import hub
from ..svdquant.adapters import folders
from .reported import reported

OTHER = "other (name it below)"


class SVDQuantFetchModel(io.ComfyNode):
    """Name in, file in the model folder; only when the node is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantFetchModel",
            display_name="SVDQuant Fetch Model",
            category="SVDQuant",
            search_aliases=["nunchaku download", "huggingface", "download checkpoint"],
            description=(
                "Download a published 4-bit checkpoint from the Hugging Face Hub into ComfyUI's model folder. "
                "A download that was cut goes on where it stopped."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*hub.PUBLISHED, OTHER],
                    tooltip="A published checkpoint; int4 and fp4 both run on any device.",
                ),
                io.String.Input(
                    "source",
                    default="",
                    tooltip=(
                        "Used with 'other': owner/repository/path/file.safetensors, with @revision if wanted, or the "
                        "file's address on the hub."
                    ),
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the file is now.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: str, source: str = "") -> io.NodeOutput:
        wanted = source.strip() if model == OTHER else model
        if not wanted:
            raise ValueError(
                f"SVDQuant Fetch Model: {OTHER!r} needs a source. Write owner/repository/file.safetensors."
            )
        kind = hub.PUBLISHED[model].folder if model in hub.PUBLISHED else folders.MODELS
        path = hub.fetch(wanted, folders.download_folder(kind), progress=folders.show_progress())
        told = f"{path.name} is in {path.parent}"
        return reported(str(path), text=told, event=told)
