"""ControlNets of ComfyUI's own classes that fit the small models and the demo, with random weights.

As in small_models.py, nothing of the pack is imported.
"""

from __future__ import annotations

import json
from pathlib import Path

import comfy.ops
import torch
from safetensors import safe_open
from torch import Tensor

from svdquant_nodes.tests.small_models import META, SDXL, SMALL, Z_IMAGE, random_weights

DEMO = Path(__file__).resolve().parents[1] / "demo" / "diffusion_models" / "svdquant-demo-int4.safetensors"


class LatentVAE:
    """Stands for the VAE that encodes a hint: 64 pixels to one place of a 16-channel latent, of a video where asked."""

    def __init__(self, video: bool = True) -> None:
        self.video = video

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        smaller = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        latent = smaller.repeat(1, 6, 1, 1)[:, :16]
        return latent.unsqueeze(2) if self.video else latent


def sdxl() -> torch.nn.Module:
    from comfy.cldm.cldm import ControlNet

    options = {k: list(v) if isinstance(v, list) else v for k, v in SDXL.items() if k != "out_channels"}
    options.pop("transformer_depth_output")
    return ControlNet(**options, hint_channels=3, **META)


def qwen() -> torch.nn.Module:
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

    return QwenImageControlNetModel(**SMALL["qwen-image"].options, **META)


def flux() -> torch.nn.Module:
    """For the demo model."""
    from comfy.ldm.flux.controlnet import ControlNetFlux

    with safe_open(DEMO, "pt") as file:
        config = json.loads(file.metadata()["comfy_config"])["model_config"]
    sizes = (
        "axes_dim",
        "context_in_dim",
        "hidden_size",
        "mlp_ratio",
        "num_heads",
        "out_channels",
        "patch_size",
    )
    options = {name: config[name] for name in (*sizes, "qkv_bias", "theta", "vec_in_dim", "guidance_embed")}
    options |= dict(in_channels=16, depth=1, depth_single_blocks=1, txt_ids_dims=[])
    return ControlNetFlux(**options, **META)


def z_image() -> torch.nn.Module:
    """A patch of the model with one block, loaded: the host's loader knows no other width than the published one."""
    from comfy.ldm.lumina.controlnet import ZImage_Control

    widths = {name: Z_IMAGE[name] for name in ("dim", "n_heads", "n_kv_heads")}
    made = {"dtype": torch.bfloat16, "operations": comfy.ops.manual_cast}
    model = ZImage_Control(**widths, n_control_layers=1, device="cpu", **made)
    model.load_state_dict(random_weights(model))
    return model


def qwen_blockwise() -> torch.nn.Module:
    """A patch of the model that adds to every block, loaded."""
    from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet

    made = {"dtype": torch.bfloat16, "device": "cpu", "operations": comfy.ops.manual_cast}
    model = QwenImageBlockWiseControlNet(num_layers=2, dim=256, **made)
    model.load_state_dict(random_weights(model))
    return model


CASES = {"sdxl": sdxl, "qwen-image": qwen, "flux": flux}


def tensors(case: str) -> dict[str, Tensor]:
    """A ControlNet's file."""
    drawn = random_weights(CASES[case]())
    if case != "flux":
        return drawn
    # by this name the host knows the trainer whose files these are
    return {n.removesuffix("weight") + "scale" if "_norm." in n else n: t for n, t in drawn.items()}
