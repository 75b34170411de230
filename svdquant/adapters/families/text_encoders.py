"""Text encoders in ComfyUI's own names, a family each: whatever the file holds goes where its name says.

T5 is not among them: its published file has a token table too many, and a table of its own (t5.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ....loaders.encoders import ENCODERS, recognise
from .native import Native


@dataclass(frozen=True)
class TextEncoder(Native):
    """The identity table of one architecture."""

    def matches(self, checkpoint) -> bool:
        if not super().matches(checkpoint):
            return False
        fields = [
            f"{name}.{field}" for name, info in checkpoint.info.items() for field in getattr(info, "keys", ())
        ]
        found = recognise([*checkpoint.plain_info, *fields])
        return found is not None and found.name == self.name


FAMILIES = tuple(
    TextEncoder(name=row.name, marker=row.linears, layers=(), strict=False, kind="text encoder")
    for row in ENCODERS
    if row.linears and row.name != "T5"
)
