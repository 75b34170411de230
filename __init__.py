"""SVDQuant for ComfyUI: 4-bit diffusion models as ordinary ComfyUI models. See README.md."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
