"""The inputs of the nodes that take one LoRA or several: a file and a strength, and further ones on demand."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..svdquant.adapters import folders

MORE = 4  # further LoRAs in one node; each choice repeats the file list, so the number stays small


def lora_inputs(suffix: str = "") -> list[io.Input]:
    """One LoRA."""
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


def further_loras() -> io.Input:
    """A choice of how many more, each with its inputs."""
    options = [
        io.DynamicCombo.Option(str(n), [i for k in range(n) for i in lora_inputs(f"_{k + 2}")])
        for n in range(MORE + 1)
    ]
    return io.DynamicCombo.Input(
        "more", options=options, optional=True, tooltip="How many further LoRAs in this node."
    )


def chosen(lora_name: str, strength: float, more: dict | None) -> list[tuple[Path, float]]:
    """The files and strengths that a user chose, in order."""
    more = more or {}
    pairs = [(lora_name, strength)]
    pairs += [
        (more[f"lora_name_{k + 2}"], more[f"strength_{k + 2}"]) for k in range(int(more.get("more", 0)))
    ]
    return [(folders.find(folders.LORAS, name), by) for name, by in pairs]
