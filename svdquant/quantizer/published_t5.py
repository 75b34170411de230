"""T5-XXL as it is published in 4 bits: Nunchaku's layout, the rest in fp16, the token table under both of its names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...loaders import nunchaku
from ...loaders.checkpoint import Lazy
from ...loaders.source import SourceModel
from ..core.weights import LinearWeights

TABLE, TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
PLAIN = torch.float16


def write(
    source: SourceModel,
    target: Path,
    layers: Lazy[LinearWeights],
    *,
    progress: Callable[[str, int, int], None],
) -> None:
    """Write the file. ValueError for a tensor that fp16 cannot hold, and for a full disk."""
    nunchaku.write(
        target, layers, _plain(source, layers), _metadata(source, len(layers) // 7), progress=progress
    )


def _plain(source: SourceModel, linears: Iterable[str]) -> Mapping[str, Tensor]:
    """The other tensors; the published engine wants the token table under both names."""
    used = {f"{name}.weight" for name in linears}
    table = TABLE if TABLE in source.shapes else TABLE_AGAIN
    kept = [name for name in source.shapes if name.startswith("encoder.") and name not in used]
    places = dict(zip(kept, kept, strict=True)) | dict.fromkeys((TABLE, TABLE_AGAIN), table)
    return Lazy(places, lambda name: source.finite(places[name], PLAIN))


def _metadata(source: SourceModel, blocks: int) -> dict[str, str]:
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
