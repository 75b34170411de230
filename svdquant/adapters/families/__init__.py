"""Which model family a checkpoint belongs to. One table a family; to add one, write its table and list it here."""

from __future__ import annotations

from ..family import Family, Mapped, Role, apply_role
from . import chroma, flux, flux2, native, pixart_sigma, qwen_image, sdxl, t5, text_encoders, z_image

# Chroma comes before FLUX.1, whose blocks' names it shares, other text encoders before T5 for the same reason; the
# host's own names last: their marker is the broadest.
TABLES = (chroma, flux, flux2, qwen_image, z_image, sdxl, pixart_sigma)
FAMILIES: tuple[Family, ...] = (
    *(table.FAMILY for table in TABLES),
    *text_encoders.FAMILIES,
    t5.FAMILY,
    native.FAMILY,
)

__all__ = ["FAMILIES", "Family", "Mapped", "Role", "apply_role", "resolve"]


def resolve(checkpoint) -> Family | None:
    """The family whose marker names the checkpoint's layers carry, or None."""
    return next((family for family in FAMILIES if family.matches(checkpoint)), None)
