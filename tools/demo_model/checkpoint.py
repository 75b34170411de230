"""Which stored tensor of a Nunchaku FLUX.1 file comes from which part of the 16-bit model.

A stored linear is a rectangle of a model linear: files keep the attention and the MLP of single blocks apart,
which the model joins by rows (`linear1`) and by columns (`linear2`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .flux import FluxConfig

Span = tuple[int, int | None]
ALL: Span = (0, None)

EMBEDDERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


@dataclass(frozen=True)
class Stored:
    """One stored linear.

    name      its name in the file
    source    the model linear it is cut from
    rows      output rows of the source, first and behind the last
    columns   input columns of the source, likewise
    has_bias  whether the source's bias goes here; if not, zeros are stored
    unsigned  whether its inputs come from a GELU, and so get unsigned codes
    chunks    0, or for a modulation the number of vectors that its rows are interleaved from
    """

    name: str
    source: str
    rows: Span = ALL
    columns: Span = ALL
    has_bias: bool = True
    unsigned: bool = False
    chunks: int = 0


def double_block(block: int) -> Iterator[Stored]:
    """The ten stored linears of a double block."""
    target, source = f"transformer_blocks.{block}.", f"double_blocks.{block}."
    for stream, norm, suffix, mlp in (
        ("img", "norm1", "", "mlp_"),
        ("txt", "norm1_context", "_context", "mlp_context_"),
    ):
        yield Stored(f"{target}{norm}.linear", f"{source}{stream}_mod.lin", chunks=6)
        yield Stored(f"{target}qkv_proj{suffix}", f"{source}{stream}_attn.qkv")
        yield Stored(f"{target}out_proj{suffix}", f"{source}{stream}_attn.proj")
        yield Stored(f"{target}{mlp}fc1", f"{source}{stream}_mlp.0")
        yield Stored(f"{target}{mlp}fc2", f"{source}{stream}_mlp.2", unsigned=True)


def single_block(block: int, width: int) -> Iterator[Stored]:
    """The five stored linears of a single block."""
    target, source = f"single_transformer_blocks.{block}.", f"single_blocks.{block}."
    yield Stored(f"{target}norm.linear", f"{source}modulation.lin", chunks=3)
    yield Stored(f"{target}qkv_proj", f"{source}linear1", rows=(0, 3 * width))
    yield Stored(f"{target}mlp_fc1", f"{source}linear1", rows=(3 * width, None))
    yield Stored(f"{target}out_proj", f"{source}linear2", columns=(0, width), has_bias=False)
    yield Stored(f"{target}mlp_fc2", f"{source}linear2", columns=(width, None), unsigned=True)


def stored_linears(config: FluxConfig) -> list[Stored]:
    """Every quantized linear of a file, in the order of the model."""
    found = [stored for block in range(config.depth) for stored in double_block(block)]
    for block in range(config.depth_single_blocks):
        found += single_block(block, config.hidden_size)
    return found


def swap_halves(tensor: Tensor) -> Tensor:
    """The last modulation is (shift, scale) in the model and (scale, shift) in files."""
    return torch.cat(tensor.chunk(2)[::-1])


def plain_tensors(weights: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """The tensors that stay 16-bit, under the file's names: embedders, last layer, query and key norms."""
    plain = {}
    for target, source in EMBEDDERS.items():
        for part in ("weight", "bias"):
            tensor = weights[f"{source}.{part}"]
            plain[f"{target}.{part}"] = swap_halves(tensor) if target.startswith("norm_out") else tensor
    for block in range(config.depth):
        for stream, added in (("img", ""), ("txt", "added_")):
            norm = f"double_blocks.{block}.{stream}_attn.norm"
            plain[f"transformer_blocks.{block}.norm_{added}q.weight"] = weights[f"{norm}.query_norm.scale"]
            plain[f"transformer_blocks.{block}.norm_{added}k.weight"] = weights[f"{norm}.key_norm.scale"]
    for block in range(config.depth_single_blocks):
        norm, target = f"single_blocks.{block}.norm", f"single_transformer_blocks.{block}"
        plain[f"{target}.norm_q.weight"] = weights[f"{norm}.query_norm.scale"]
        plain[f"{target}.norm_k.weight"] = weights[f"{norm}.key_norm.scale"]
    return plain


def metadata(config: FluxConfig) -> dict[str, str]:
    """The header that a published FLUX.1 file has, for these sizes, but for what the writer adds."""
    sizes = {**config.to_json(), "image_model": "flux", "disable_unet_model_creation": True}
    diffusers = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.hidden_size // config.num_heads,
        "axes_dims_rope": list(config.axes_dim),
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels * config.patch_size**2,
        "joint_attention_dim": config.context_in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "patch_size": 1,
        "pooled_projection_dim": config.vec_in_dim,
    }
    header = {
        "config": diffusers,
        "comfy_config": {"model_class": "FluxSchnell", "model_config": sizes},
    }
    return {
        "model_class": "NunchakuFluxTransformer2dModel",
        **{key: json.dumps(value) for key, value in header.items()},
    }
