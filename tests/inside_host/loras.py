"""LoRA dictionaries for the demo model, random but effective, in the namings users have."""

from __future__ import annotations

import comfy.sd
import torch
from torch import Tensor

HIDDEN, SINGLE = 256, 2


class _Random:
    def __init__(self, seed: int, rank: int) -> None:
        self.generator, self.rank = torch.Generator().manual_seed(seed), rank

    def pair(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        up = torch.randn(n, self.rank, generator=self.generator) * 0.3
        return up, torch.randn(self.rank, k, generator=self.generator) / k**0.5


def kohya(seed: int = 5, rank: int = 4) -> dict[str, Tensor]:
    """sd-scripts naming on the original FLUX modules, with alpha."""
    random, out = _Random(seed, rank), {}
    shapes = {
        "double_blocks_0_img_attn_qkv": (3, 1),
        "double_blocks_0_txt_mlp_2": (1, 4),
        "double_blocks_0_img_mod_lin": (6, 1),
        **{f"single_blocks_{i}_linear1": (7, 1) for i in range(SINGLE)},
        **{f"single_blocks_{i}_linear2": (1, 5) for i in range(SINGLE)},
    }
    for name, (n, k) in shapes.items():
        up, down = random.pair(n * HIDDEN, k * HIDDEN)
        out |= {
            f"lora_unet_{name}.lora_up.weight": up,
            f"lora_unet_{name}.lora_down.weight": down,
            f"lora_unet_{name}.alpha": torch.tensor(2.0),
        }
    return out


def comfy_names(seed: int = 6, rank: int = 4) -> dict[str, Tensor]:
    """ComfyUI's own module names, lora_A and lora_B."""
    random, out = _Random(seed, rank), {}
    for name, n, k in (("double_blocks.0.img_mlp.0", 4, 1), ("single_blocks.1.linear2", 1, 5)):
        up, down = random.pair(n * HIDDEN, k * HIDDEN)
        out |= {f"diffusion_model.{name}.lora_B.weight": up, f"diffusion_model.{name}.lora_A.weight": down}
    return out


def plain_layer(seed: int = 10) -> dict[str, Tensor]:
    """A LoRA on a layer that stays 16-bit."""
    up, down = _Random(seed, 4).pair(HIDDEN, 64)
    return {"diffusion_model.img_in.lora_B.weight": up, "diffusion_model.img_in.lora_A.weight": down}


def diffusers(seed: int = 7, rank: int = 4) -> dict[str, Tensor]:
    """diffusers names: q, k and v apart, which the host turns into slices of fused layers."""
    random, out = _Random(seed, rank), {}
    names = [(f"transformer_blocks.0.attn.{x}", 1, 1) for x in ("to_q", "to_v", "add_k_proj", "to_out.0")]
    names += [("transformer_blocks.0.ff.net.0.proj", 4, 1)]
    names += [(f"single_transformer_blocks.{i}.attn.to_k", 1, 1) for i in range(SINGLE)]
    names += [("single_transformer_blocks.0.proj_mlp", 4, 1), ("single_transformer_blocks.1.proj_out", 1, 5)]
    for name, n, k in names:
        up, down = random.pair(n * HIDDEN, k * HIDDEN)
        out |= {f"transformer.{name}.lora_B.weight": up, f"transformer.{name}.lora_A.weight": down}
    return out


def dora(seed: int = 8, rank: int = 4) -> dict[str, Tensor]:
    """A kohya LoRA whose `dora_scale` also rescales the weight."""
    out = {name: t for name, t in kohya(seed, rank).items() if "linear1" in name or "qkv" in name}
    for name in [n for n in out if n.endswith("lora_down.weight")]:
        out[name.replace("lora_down.weight", "dora_scale")] = torch.full((1, out[name].shape[1]), 2.0)
    return out


def loha(seed: int = 9, rank: int = 2) -> dict[str, Tensor]:
    """A Hadamard product of two pairs, on one layer."""
    random, name = _Random(seed, rank), "lora_unet_single_blocks_0_linear2"
    (b1, a1), (b2, a2) = random.pair(HIDDEN, 5 * HIDDEN), random.pair(HIDDEN, 5 * HIDDEN)
    return {
        f"{name}.hada_w1_a": b1,
        f"{name}.hada_w1_b": a1,
        f"{name}.hada_w2_a": b2 * 20,
        f"{name}.hada_w2_b": a2 * 20,
        f"{name}.alpha": torch.tensor(float(rank)),
    }


def stock(model, tensors: dict[str, Tensor], strength: float = 1.0):
    """What LoraLoaderModelOnly does."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0]
