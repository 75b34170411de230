"""A 16-bit T5 encoder becomes a file like the published 4-bit one, a linear in memory at a time, from weights alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...loaders import nunchaku
from ...loaders.checkpoint import Lazy
from ...loaders.source import SourceModel
from ..core.weights import LinearWeights
from . import awq

Progress = Callable[[str, int, int, float | None], None]

FAMILY = "T5"
GROUP = 128
LINEAR = re.compile(
    r"encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(wi_0|wi_1|wo))\.weight"
)
TABLE, TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
PLAIN = torch.float16  # what the published file keeps the rest in


def is_t5(source: SourceModel) -> bool:
    """Whether a model is a T5 encoder under Hugging Face's names, as ComfyUI's t5xxl files are.

    Raises ValueError for a relative that the loader could not run: UMT5, and T5 of before version 1.1.
    """
    if BIAS not in source.shapes:
        return False
    if BIAS.replace(".0.", ".1.", 1) in source.shapes or GATE not in source.shapes:
        raise ValueError(
            f"{source.path.name}: expected a T5 encoder of version 1.1, got "
            f"{'a T5 1.0' if GATE not in source.shapes else 'UMT5'}. Use it in 16 bits or fp8."
        )
    return True


def quantize(
    source: SourceModel, target: Path, *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, float]:
    """Write the encoder with its linears in AWQ W4A16 of group 128.

    progress  called with (name, linears done, linears in all, its relative error)
    returns   relative error of every linear's weight

    Raises ValueError for another model, for a linear that is damaged or fits no group, and for a full disk.
    """
    if not is_t5(source):
        raise ValueError(
            f"{source.path.name}: expected a T5 text encoder, got none of its layers. Choose a t5xxl file; a "
            "diffusion model is quantized with SVDQuant Quantize."
        )
    linears = [name.removesuffix(".weight") for name in source.shapes if LINEAR.fullmatch(name)]
    errors: dict[str, float] = {}

    def make(name: str) -> LinearWeights:
        weights, errors[name] = _quantized(source, name, device)
        return weights

    def report(name: str, done: int, total: int) -> None:
        if progress:
            progress(name, done, total, errors[name])

    plain = _plain(source, linears)
    nunchaku.write(target, Lazy(linears, make), plain, metadata(source, len(linears) // 7), progress=report)
    return errors


def _quantized(source: SourceModel, name: str, device: str) -> tuple[LinearWeights, float]:
    weight, _ = source.linear(name)
    n, k = weight.shape
    if n % 4 or k % GROUP:
        raise ValueError(
            f"{source.path.name}: {name}: expected rows in fours and columns in groups of {GROUP}, got {n} x {k}. "
            "Only T5 encoders as wide as T5-base can be quantized."
        )
    try:
        weights, error = awq.quantize_weight(weight.to(device), GROUP)
    except ValueError as problem:
        raise ValueError(f"{source.path.name}: {name}: {problem}") from None
    return LinearWeights(weights.spec, **{field: t.cpu() for field, t in weights.tensors().items()}), error


def _plain(source: SourceModel, linears: Iterable[str]) -> Mapping[str, Tensor]:
    """The other tensors in 16 bits; the token table twice, since the published engine wants both of its names."""
    used = {f"{name}.weight" for name in linears}
    table = TABLE if TABLE in source.shapes else TABLE_AGAIN
    kept = [name for name in source.shapes if name.startswith("encoder.") and name not in used]
    places = dict(zip(kept, kept, strict=True)) | dict.fromkeys((TABLE, TABLE_AGAIN), table)
    return Lazy(places, lambda name: _in_sixteen_bits(source, places[name]))


def _in_sixteen_bits(source: SourceModel, name: str) -> Tensor:
    tensor = source.tensors[name].to(PLAIN)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{source.path.name}: {name}: expected finite numbers within {PLAIN}, got others. "
            "The source file is damaged."
        )
    return tensor


def metadata(source: SourceModel, blocks: int) -> dict[str, str]:
    """The header of the published file, with this encoder's sizes."""
    shapes = source.shapes
    table = shapes[TABLE] if TABLE in shapes else shapes[TABLE_AGAIN]
    inner, heads = shapes[BIAS.replace("relative_attention_bias", "q")][0], shapes[BIAS][1]
    config = dict(architectures=["T5EncoderModel"], model_type="t5", vocab_size=table[0], d_model=table[1])
    config |= dict(d_kv=inner // heads, d_ff=shapes[GATE][0], num_layers=blocks, num_heads=heads)
    config |= dict(relative_attention_num_buckets=shapes[BIAS][0], relative_attention_max_distance=128)
    config |= dict(feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6, tie_word_embeddings=False)
    config |= dict(pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False)
    return {"model_class": "NunchakuT5EncoderModel", "config": json.dumps(config)}
