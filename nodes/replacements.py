"""Old workflows: offer our nodes where a graph asks for ComfyUI-nunchaku's and they are not installed."""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

MODEL_OUT = [{"new_idx": 0, "old_idx": 0}]


def replacements() -> list[io.NodeReplace]:
    """Each loader and LoRA node of that pack, its widgets in their stored order, on ours."""
    return [
        io.NodeReplace(
            new_node_id="SVDQuantLoadModel",
            old_node_id="NunchakuFluxDiTLoader",
            old_widget_ids=[
                "model_path",
                "cache_threshold",
                "attention",
                "cpu_offload",
                "device_id",
                "data_type",
            ],
            input_mapping=[{"new_id": "model_name", "old_id": "model_path"}],
            output_mapping=MODEL_OUT,
        ),
        io.NodeReplace(
            new_node_id="SVDQuantLoadModel",
            old_node_id="NunchakuQwenImageDiTLoader",
            old_widget_ids=["model_name", "cpu_offload", "num_blocks_on_gpu", "use_pin_memory"],
            input_mapping=[{"new_id": "model_name", "old_id": "model_name"}],
            output_mapping=MODEL_OUT,
        ),
        io.NodeReplace(
            new_node_id="SVDQuantApplyLora",
            old_node_id="NunchakuFluxLoraLoader",
            old_widget_ids=["lora_name", "lora_strength"],
            input_mapping=[
                {"new_id": "model", "old_id": "model"},
                {"new_id": "lora_name", "old_id": "lora_name"},
                {"new_id": "strength", "old_id": "lora_strength"},
            ],
            output_mapping=MODEL_OUT,
        ),
    ]


async def register_replacements() -> None:
    """Tell the host; older ones without the API are left alone."""
    api = getattr(ComfyAPI(), "node_replacement", None)
    if api is None:
        return
    for replacement in replacements():
        await api.register(replacement)
