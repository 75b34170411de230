"""A FLUX.1 of random weights, 128 wide, with one block of each kind, and the same model under diffusers' names."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, CONTEXT, POOLED = 128, 64, 32


def _linear(name: str, n: int, k: int, draw: torch.Generator) -> dict[str, Tensor]:
    weight = torch.randn(n, k, generator=draw) / k**0.5
    return {
        f"{name}.weight": weight.bfloat16(),
        f"{name}.bias": torch.randn(n, generator=draw).bfloat16() * 0.1,
    }


def flux(seed: int = 0) -> dict[str, Tensor]:
    """The state dict under the authors' names."""
    draw, w = torch.Generator().manual_seed(seed), WIDTH
    sizes = {"img_in": (w, 64), "txt_in": (w, CONTEXT), "final_layer.linear": (64, w)}
    sizes |= {"final_layer.adaLN_modulation.1": (2 * w, w)}
    for name, k in (("time_in", 256), ("vector_in", POOLED)):
        sizes |= {f"{name}.in_layer": (w, k), f"{name}.out_layer": (w, w)}
    for stream in ("img", "txt"):
        d = f"double_blocks.0.{stream}_"
        sizes |= {d + "mod.lin": (6 * w, w), d + "attn.qkv": (3 * w, w), d + "attn.proj": (w, w)}
        sizes |= {d + "mlp.0": (4 * w, w), d + "mlp.2": (w, 4 * w)}
    s = "single_blocks.0."
    sizes |= {s + "linear1": (7 * w, w), s + "linear2": (w, 5 * w), s + "modulation.lin": (3 * w, w)}
    tensors = {key: t for name, (n, k) in sizes.items() for key, t in _linear(name, n, k, draw).items()}
    for norm in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for part in ("query", "key"):
            tensors[f"{norm}.norm.{part}_norm.scale"] = torch.rand(128, generator=draw).bfloat16()
    return tensors


def chroma(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.1's state dict made Chroma's: a network in place of modulations and embedders."""
    gone, draw = ("_mod.", ".modulation.", "time_in.", "vector_in.", "adaLN_modulation"), torch.Generator()
    made = {n: t for n, t in tensors.items() if not any(part in n for part in gone)}
    network = "distilled_guidance_layer."
    for name in ("in_proj", "layers.0.in_layer", "layers.0.out_layer", "out_proj"):
        made |= _linear(network + name, WIDTH, WIDTH, draw.manual_seed(len(name)))
    return made | {f"{network}norms.0.scale": torch.ones(WIDTH).bfloat16()}


def diffusers_chroma(tensors: dict[str, Tensor], flux: dict[str, Tensor]) -> dict[str, Tensor]:
    """`chroma(flux)` as diffusers names it."""
    network = "distilled_guidance_layer."
    gone = ("norm1", "norm.linear", "time_text_embed", "norm_out")
    made = {n: t for n, t in diffusers(flux).items() if not any(part in n for part in gone)}
    steps = {".in_layer": ".linear_1", ".out_layer": ".linear_2"}
    for name, t in tensors.items():
        if name.startswith(network):
            for old, new in steps.items():
                name = name.replace(old, new)
            made[name] = t
    return made


def diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model as diffusers names and splits it."""
    names = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
        "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
        "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
        "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
        "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj",
        "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.net.2",
        "double_blocks.0.txt_mlp.0": "transformer_blocks.0.ff_context.net.0.proj",
        "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
        "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
        "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear",
    }
    attention = "transformer_blocks.0.attn."
    made = {
        f"{new}.{end}": tensors[f"{old}.{end}"] for old, new in names.items() for end in ("weight", "bias")
    }
    for end in ("weight", "bias"):
        made[f"norm_out.linear.{end}"] = torch.cat(
            tensors[f"final_layer.adaLN_modulation.1.{end}"].chunk(2)[::-1]
        )
        for stream, parts in (("img", "to_q to_k to_v"), ("txt", "add_q_proj add_k_proj add_v_proj")):
            pieces = tensors[f"double_blocks.0.{stream}_attn.qkv.{end}"].chunk(3)
            made |= {f"{attention}{n}.{end}": t for n, t in zip(parts.split(), pieces, strict=True)}
        pieces = tensors[f"single_blocks.0.linear1.{end}"].split([WIDTH] * 3 + [4 * WIDTH])
        single = "single_transformer_blocks.0."
        targets = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        made |= {f"{single}{n}.{end}": t for n, t in zip(targets, pieces, strict=True)}
    for part, short in (("query", "q"), ("key", "k")):
        norm = f"norm.{part}_norm.scale"
        made[f"{attention}norm_{short}.weight"] = tensors[f"double_blocks.0.img_attn.{norm}"]
        made[f"{attention}norm_added_{short}.weight"] = tensors[f"double_blocks.0.txt_attn.{norm}"]
        made[f"single_transformer_blocks.0.attn.norm_{short}.weight"] = tensors[f"single_blocks.0.{norm}"]
    return made


def write(path, tensors: dict[str, Tensor], **metadata: str):
    """A safetensors file of these tensors."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata or None)
    return path
