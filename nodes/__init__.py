"""The nodes: schemas and tooltips here, work in `svdquant/adapters`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..svdquant.adapters import folders
from .apply_lora import SVDQuantApplyLora
from .bake_lora import SVDQuantBakeLora
from .calibrate import SVDQuantCalibrate
from .compare import SVDQuantCompare
from .demo import SVDQuantDemoPrompt, SVDQuantDemoVAE
from .fetch_model import SVDQuantFetchModel
from .inspect import SVDQuantInspect
from .load_model import SVDQuantLoadModel
from .load_text_encoder import SVDQuantLoadTextEncoder
from .quantize import SVDQuantQuantize
from .quantize_text_encoder import SVDQuantQuantizeTextEncoder
from .replacements import register_replacements
from .sample import SVDQuantSample


class SVDQuantExtension(ComfyExtension):
    """What the host asks the pack for."""

    async def on_load(self) -> None:
        folders.register_demo()
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SVDQuantLoadModel,
            SVDQuantLoadTextEncoder,
            SVDQuantApplyLora,
            SVDQuantBakeLora,
            SVDQuantSample,
            SVDQuantInspect,
            SVDQuantFetchModel,
            SVDQuantCalibrate,
            SVDQuantQuantize,
            SVDQuantQuantizeTextEncoder,
            SVDQuantCompare,
            SVDQuantDemoPrompt,
            SVDQuantDemoVAE,
        ]


async def comfy_entrypoint() -> SVDQuantExtension:
    """The host calls this once."""
    return SVDQuantExtension()
