"""The node that joins LoRAs to a model's low-rank branch."""

from __future__ import annotations

from comfy_api.latest import io

from ..svdquant.adapters import folders
from ..svdquant.adapters.lora.apply import apply_lora
from .checked import checked, fingerprint
from .lora_inputs import chosen, further_loras, lora_inputs
from .reported import reported


class SVDQuantApplyLora(io.ComfyNode):
    """MODEL in, MODEL with LoRAs out, and what each of them did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantApplyLora",
            display_name="SVDQuant Apply LoRA",
            category="SVDQuant",
            search_aliases=["nunchaku lora", "lora loader", "lora stack", "svdq lora"],
            description=(
                "Join LoRAs to a model as extra rank: exact, removable, without requantizing. ComfyUI's own LoRA "
                "loaders do the same; this node knows more trainers' names and reports what matched."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A 4-bit model, or any other."),
                *lora_inputs(),
                further_loras(),
            ],
            outputs=[
                io.Model.Output(tooltip="A clone with the LoRAs; the input model is unchanged."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Layers matched, rank, bytes, error, tensors left over.",
                ),
            ],
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, *, more: object = None) -> bool | str:
        return checked(folders.LORAS, lora_name)

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> object:
        return fingerprint(folders.LORAS, inputs)

    @classmethod
    def execute(
        cls, model, lora_name: str, strength: float, more: dict | str | None = None, **others
    ) -> io.NodeOutput:
        reports = []
        for path, by in chosen(lora_name, strength, more, others):
            model, report = apply_lora(model, path, by)
            reports.append(str(report))
        text = "\n".join(reports)
        return reported(model, text, text=text)
