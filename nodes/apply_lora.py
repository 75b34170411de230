"""The node that joins LoRAs to a model's low-rank branch."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..svdquant.adapters import folders, lora

MORE = 4  # further LoRAs in one node; each choice repeats the file list, so the number stays small


def _lora_inputs(suffix: str = "") -> list[io.Input]:
    return [
        io.Combo.Input(
            f"lora_name{suffix}",
            options=folders.names(folders.LORAS),
            tooltip="A LoRA in models/loras, in any trainer's naming.",
        ),
        io.Float.Input(
            f"strength{suffix}",
            default=1.0,
            min=-100.0,
            max=100.0,
            step=0.01,
            tooltip="How strongly it acts; 0 switches it off, negative values turn its effect around.",
        ),
    ]


class SVDQuantApplyLora(io.ComfyNode):
    """MODEL in, MODEL with LoRAs out, and what each of them did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [
            io.DynamicCombo.Option(str(n), [i for k in range(n) for i in _lora_inputs(f"_{k + 2}")])
            for n in range(MORE + 1)
        ]
        return io.Schema(
            node_id="SVDQuantApplyLora",
            display_name="SVDQuant Apply LoRA",
            category="SVDQuant",
            search_aliases=["nunchaku lora", "lora loader", "lora stack", "svdq lora"],
            description=(
                "Join LoRAs to a model as extra rank: exact, removable, without requantizing. ComfyUI's own LoRA "
                "loaders do the same; this node also reports what matched."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A 4-bit model, or any other."),
                *_lora_inputs(),
                io.DynamicCombo.Input(
                    "more",
                    options=options,
                    optional=True,
                    tooltip="How many further LoRAs to apply in this node.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="A clone with the LoRAs; the input model is unchanged."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Layers matched, rank, bytes, error, tensors left over.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, lora_name: str, strength: float, more: dict | None = None) -> io.NodeOutput:
        chosen, extra = [(lora_name, strength)], more or {}
        for k in range(int(extra.get("more", 0))):
            chosen.append((extra[f"lora_name_{k + 2}"], extra[f"strength_{k + 2}"]))
        reports = []
        for name, by in chosen:
            model, report = lora.apply_lora(model, folders.find(folders.LORAS, name), by)
            reports.append(str(report))
        text = "\n".join(reports)
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))
