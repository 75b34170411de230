"""Any model whose file already uses ComfyUI's own names: every stored layer is the host layer of the same name."""

from __future__ import annotations

from dataclasses import dataclass

from ..family import Family, Mapped, Role, Source


@dataclass(frozen=True)
class Native(Family):
    """The identity table: nothing to rename, nothing to join."""

    def map_names(self, checkpoint) -> Mapped:
        return Mapped(
            linears={name: ((name, Role()),) for name in checkpoint.info},
            axes=dict.fromkeys(checkpoint.info, "rows"),
            plain={name: Source((name,)) for name in checkpoint.plain_info},
            left_over=(),
        )


# Block names of ComfyUI's own model classes that no published SVDQuant dialect uses.
FAMILY = Native(
    name="ComfyUI model",
    marker=r"(double_blocks|single_blocks|input_blocks|middle_block|output_blocks|blocks|layers)\.\d+\..*",
    layers=(),
)
