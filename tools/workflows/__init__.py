"""Every workflow of the pack, described once."""

from __future__ import annotations

from . import demo, families, flux, quantizing
from .graph import Workflow

WORKFLOWS: tuple[Workflow, ...] = (
    *demo.WORKFLOWS,
    *flux.WORKFLOWS,
    *families.WORKFLOWS,
    *quantizing.WORKFLOWS,
)
