"""The inputs of the nodes that take one LoRA or several: a file and a strength, and further ones on demand."""

from __future__ import annotations

from collections.abc import Iterable
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
    """A choice of how many more, each with its inputs.

    Nodes that have it accept all inputs: the host drops a choice it does not know, and says nothing.
    """
    options = [
        io.DynamicCombo.Option(str(n), [i for k in range(n) for i in lora_inputs(f"_{k + 2}")])
        for n in range(MORE + 1)
    ]
    return io.DynamicCombo.Input(
        "more", options=options, optional=True, tooltip="How many further LoRAs in this node."
    )


def chosen(
    lora_name: str, strength: float, more: dict | str | None, others: Iterable[str] = ()
) -> list[tuple[Path, float]]:
    """The files and strengths that a user chose, in order.

    more    a dict with its inputs; as it was sent where it is none of the options, which the host leaves to the node
    others  names of inputs that belong to no option that was chosen

    Raises ValueError for a number of LoRAs that is none of the options, and for a LoRA beyond that number.
    """
    more = {} if more is None else more
    if not isinstance(more, dict):
        raise ValueError(
            f'more: expected "0" to "{MORE}" further LoRAs, in quotes, got {more!r}. Send one of these.'
        )
    stray = sorted(name for name in others if name.startswith("more."))
    if stray:
        raise ValueError(
            f'{stray[0]}: expected no such input with "more": "{more.get("more", 0)}", got one. '
            "Raise more, or leave it out."
        )
    pairs = [(lora_name, strength)]
    pairs += [
        (more[f"lora_name_{k + 2}"], more[f"strength_{k + 2}"]) for k in range(int(more.get("more", 0)))
    ]
    return [(folders.find(folders.LORAS, name), by) for name, by in pairs]
