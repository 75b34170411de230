"""Every family's own class in ComfyUI, at a width no published file has, with random weights.

Where the host reads a model's width off a table and not off the weights, it is told ours. Nothing of the pack is
imported here: a running ComfyUI reads this file too, by tests/host/small_nodes.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor

META = {"dtype": torch.bfloat16, "device": "meta", "operations": comfy.ops.disable_weight_init}
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 0, 0, 1, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_checkpoint": False,
}
FLUX_LIKE = dict(context_in_dim=64, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1)
CHROMA = FLUX_LIKE | dict(
    **dict(
        in_channels=64, out_channels=64, vec_in_dim=None, mlp_ratio=4.0, axes_dim=[16, 56, 56], theta=10000
    ),
    **dict(patch_size=2, qkv_bias=True, txt_ids_dims=[], in_dim=64, out_dim=256, hidden_dim=128, n_layers=2),
)
FLUX2 = FLUX_LIKE | dict(
    **dict(in_channels=128, out_channels=128, vec_in_dim=None, mlp_ratio=3.0, axes_dim=[32] * 4, theta=2000),
    **dict(patch_size=1, qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True),
    **dict(mlp_silu_act=True, ops_bias=False, default_ref_method="index", ref_index_scale=10.0),
)
WAN = dict(
    model_type="t2v", dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=4096, cross_attn_norm=True
)
Z_IMAGE = dict(
    **dict(patch_size=2, in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2),
    **dict(axes_dims=[32, 48, 48], axes_lens=[64, 64, 64], qk_norm=True, cap_feat_dim=64, time_scale=1000.0),
    **dict(z_image_modulation=True, pad_tokens_multiple=32, ffn_dim_multiplier=8 / 3, rope_theta=256.0),
)
_BLOCKS = ("blocks.", "middle_block.", "layers.", "refiner.")


@dataclass(frozen=True)
class Small:
    """A family's class and what it is sampled with.

    build    module and class of the host
    options  the class's arguments
    latent   shape of an empty latent
    text     width of its text
    pooled   width of its pooled text, 0 where it has none; old hosts want one for every FLUX
    dense    parts of the names of linears in blocks that stay 16-bit
    linears  how many linears of the host our quantizer makes 4-bit
    layout   the dialect our quantizer writes
    unused   shapes of tensors that published files have and the host's class has no place for
    """

    build: tuple[str, str]
    options: Mapping[str, Any]
    latent: tuple[int, ...]
    text: int
    pooled: int = 0
    dense: tuple[str, ...] = ()
    linears: int = 0
    layout: str = "natural"
    unused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def model(self) -> torch.nn.Module:
        """The host's class, on meta."""
        module = import_module(self.build[0])
        options = {k: list(v) if isinstance(v, list) else v for k, v in self.options.items()}
        return getattr(module, self.build[1])(**options, **META)

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """A 16-bit file of it."""
        unused = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in self.unused.items()}
        return random_weights(self.model(), seed) | unused

    def quantizes(self, name: str, width: int) -> bool:
        inside = any(part in name for part in _BLOCKS) and not any(part in name for part in self.dense)
        return inside and width % 64 == 0


SMALL = {
    "sdxl": Small(
        ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
        SDXL,
        (1, 4, 8, 8),
        2048,
        1280,
        linears=72,
        layout="nunchaku_v1",
    ),
    "pixart-sigma": Small(
        ("comfy.ldm.pixart.pixartms", "PixArtMS"),
        dict(depth=1, model_max_length=300, micro_condition=False),
        (1, 4, 40, 40),
        4096,
        linears=7,
        unused={"pos_embed": (1, 1024, 1152)},
    ),
    "qwen-image": Small(
        ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel"),
        dict(num_layers=2, num_attention_heads=2),
        (1, 16, 1, 8, 8),
        3584,
        dense=("img_mod", "txt_mod", "net.2"),
        linears=28,
        layout="nunchaku_v2",
    ),
    "z-image": Small(
        ("comfy.ldm.lumina.model", "NextDiT"),
        Z_IMAGE,
        (1, 16, 8, 8),
        64,
        linears=20,
        layout="nunchaku_v2",
    ),
    "chroma": Small(
        ("comfy.ldm.chroma.model", "Chroma"),
        CHROMA,
        (1, 16, 8, 8),
        64,
        64,
        linears=10,
    ),
    "flux2": Small(("comfy.ldm.flux.model", "Flux"), FLUX2, (1, 128, 8, 8), 64, 64, linears=10),
    "wan": Small(("comfy.ldm.wan.model", "WanModel"), WAN, (1, 16, 1, 8, 8), 4096, linears=20),
}


# By the host's name for a family: what it is told of a model's config.
TOLD = {
    "qwen_image": {"num_attention_heads": 2},
    "lumina2": {k: v for k, v in Z_IMAGE.items() if k not in ("dim", "n_layers", "cap_feat_dim")},
    "chroma": {"out_dim": 256, "hidden_dim": 128, "n_layers": 2},
    "flux2": {"num_heads": 2},
}


@contextmanager
def detecting() -> Iterator[None]:
    """While this lasts, the host's detection knows better."""
    original = comfy.model_detection.detect_unet_config

    def detect(*args, **kwargs):
        config = original(*args, **kwargs)
        return config if config is None else config | TOLD.get(config.get("image_model"), {})

    width = {"dim": Z_IMAGE["dim"]}  # by which the host tells Z-Image from Lumina 2
    known = mock.patch.dict(comfy.supported_models.ZImage.unet_config, width)
    with known, mock.patch.object(comfy.model_detection, "detect_unet_config", detect):
        yield


@contextmanager
def detecting_t5() -> Iterator[None]:
    """While this lasts, a T5 1.1 of any depth and width is T5-XXL to the host."""
    original, gate = comfy.sd.detect_te_model, "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"

    def detect(tensors: Mapping[str, Tensor]) -> Any:
        return comfy.sd.TEModel.T5_XXL if gate in tensors else original(tensors)

    with mock.patch.object(comfy.sd, "detect_te_model", detect):
        yield


def random_weights(model: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """bf16 tensors for every name of a meta model: matrices keep the variance, norms are one, biases open the gates."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, like in model.state_dict().items():
        if like.ndim > 1:
            t = torch.randn(like.shape, generator=generator) * (1 / like[0].numel() ** 0.5)
        elif name.endswith("weight"):
            t = torch.ones(like.shape)
        else:
            t = torch.randn(like.shape, generator=generator) * 0.2
        tensors[name] = t.to(torch.bfloat16)
    return tensors


def prompt(small: Small, generator: torch.Generator, control=None) -> list:
    """CONDITIONING of random tensors."""
    more: dict[str, Any] = {"control": control, "control_apply_to_uncond": True} if control else {}
    context = torch.randn(1, 8, small.text, generator=generator)
    if small.pooled:
        more["pooled_output"] = torch.randn(1, small.pooled, generator=generator)
    return [[context, more]]
