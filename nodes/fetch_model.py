"""The node that brings a published checkpoint into ComfyUI's model folder."""

from __future__ import annotations

