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


# What ComfyUI's own model classes call their blocks; text encoders are no diffusion models.
_BLOCKS = r"(\w+_)?(block|blocks|layers|refiner)"

FAMILY = Native(
    name="ComfyUI model",
    marker=rf"(?!(en|de)coder\.)(\w+\.)*({_BLOCKS}|middle_block)\.\d+\..+",
    layers=(),
    optional=r"y_embedder\.y_embedding",  # PixArt's prompt for training without one
    strict=False,
)
