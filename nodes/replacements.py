"""Old workflows: offer our nodes where a graph asks for ComfyUI-nunchaku's and they are not installed."""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

ENCODERS = {name: name for name in ("text_encoder1", "text_encoder2", "t5_min_length")}

# old node -> (ours, its widgets in their stored order, {our input: its input})
REPLACEMENTS = {
    "NunchakuFluxDiTLoader": (
        "SVDQuantLoadModel",
        ["model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type"],
        {"model_name": "model_path"},
    ),
    "NunchakuQwenImageDiTLoader": (
        "SVDQuantLoadModel",
        ["model_name", "cpu_offload", "num_blocks_on_gpu", "use_pin_memory"],
        {"model_name": "model_name"},
    ),
    "NunchakuTextEncoderLoader": (
        "SVDQuantLoadTextEncoder",
        ["model_type", "text_encoder1", "text_encoder2", "t5_min_length", "use_4bit_t5", "int4_model"],
        ENCODERS,
    ),
    "NunchakuTextEncoderLoaderV2": (
        "SVDQuantLoadTextEncoder",
        ["model_type", "text_encoder1", "text_encoder2", "t5_min_length"],
        ENCODERS,
    ),
    "NunchakuFluxLoraLoader": (
        "SVDQuantApplyLora",
        ["lora_name", "lora_strength"],
        {"model": "model", "lora_name": "lora_name", "strength": "lora_strength"},
    ),
}


async def register_replacements() -> None:
    """Tell the host; one without the API is left alone."""
    api = getattr(ComfyAPI(), "node_replacement", None)
    for old, (new, widgets, inputs) in REPLACEMENTS.items() if api else ():
        await api.register(
            io.NodeReplace(
                new_node_id=new,
                old_node_id=old,
                old_widget_ids=widgets,
                input_mapping=[{"new_id": ours, "old_id": theirs} for ours, theirs in inputs.items()],
                output_mapping=[{"new_idx": 0, "old_idx": 0}],
            )
        )
