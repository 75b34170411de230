"""The sizes of an encoder, from its tensors, in the words of the host's classes.

Without them the host would take those of the published encoder, and refuse one with a few words more or layers less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .families import t5

# What the host calls an encoder, in each of the models that use it
HOST_NAMES = {
    "T5": ("t5xxl",),
    "T5 1.0": ("t5xxl",),
    "UMT5": ("umt5xxl",),
    "Qwen3": ("qwen3_4b", "qwen3_8b", "qwen3_2b"),
    "Qwen3-VL": ("qwen3vl_4b", "qwen3vl_8b", "qwen3_4b", "qwen3_8b"),
    "Qwen2.5-VL": ("qwen25_7b", "qwen25_3b"),
    "Gemma 2": ("gemma2_2b",),
    "Gemma 3": ("gemma3_4b", "gemma3_4b_vision"),
    "Mistral": ("mistral3_24b", "ministral3_3b"),
    "Llama 3.1": ("llama",),
}
HEAD = {"Gemma 2": 256, "Gemma 3": 256}  # columns of a head; 128 in all others that are no T5
_ATTENTION = "encoder.block.0.layer.0.SelfAttention."
_FEED_FORWARD = "encoder.block.0.layer.1.DenseReluDense."


def options(path: Path, encoder: str, state: Mapping[str, Tensor]) -> dict[str, dict]:
    """The model options that tell the host's class. ValueError names a tensor that is missing."""
    sizes = (_t5 if "T5" in encoder else _decoder)(path, encoder, state)
    return {f"{name}_model_config": dict(sizes) for name in HOST_NAMES[encoder]}


def _t5(path: Path, encoder: str, state: Mapping[str, Tensor]) -> dict[str, int]:
    names = (t5.TABLE, f"{_ATTENTION}q.weight", f"{_ATTENTION}relative_attention_bias.weight")
    gate = "wi" if encoder == "T5 1.0" else "wi_0"
    table, q, bias, wi = _shapes(path, state, *names, f"{_FEED_FORWARD}{gate}.weight")
    return {
        "vocab_size": table[0],
        "d_model": table[1],
        "num_heads": bias[1],
        "d_kv": q[0] // bias[1],
        "d_ff": wi[0],
        "num_layers": _depth(path, state, r"encoder\.block\.(\d+)\."),
    }


def _decoder(path: Path, encoder: str, state: Mapping[str, Tensor]) -> dict[str, int | bool]:
    model = "model.language_model." if encoder == "Qwen3-VL" else "model."
    first, head = f"{model}layers.0.", HEAD.get(encoder, 128)
    names = (
        f"{model}embed_tokens",
        *(f"{first}{x}" for x in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")),
    )
    table, q, k, up = _shapes(path, state, *(f"{name}.weight" for name in names))
    sizes = {
        "vocab_size": table[0],
        "hidden_size": table[1],
        "intermediate_size": up[0],
        "num_hidden_layers": _depth(path, state, rf"{re.escape(model)}layers\.(\d+)\."),
        "num_attention_heads": q[0] // head,
        "num_key_value_heads": k[0] // head,
    }
    tied = not any(name.endswith("lm_head.weight") for name in state)
    return sizes | {"lm_head": False} if tied else sizes


def _shapes(path: Path, state: Mapping[str, Tensor], *names: str) -> list[tuple[int, ...]]:
    for name in names:
        if name not in state:
            raise ValueError(f"{path.name}: {name} is missing. The file is incomplete; download it again.")
    return [tuple(state[name].shape) for name in names]


def _depth(path: Path, state: Mapping[str, Tensor], block: str) -> int:
    blocks = {found[1]: name for name in state if (found := re.match(block, name))}
    stray = next((name for i, name in blocks.items() if i not in map(str, range(len(blocks)))), None)
    if stray:
        raise ValueError(
            f"{path.name}: {stray}: expected blocks 0 to {len(blocks) - 1}, got another. "
            "The file is incomplete; download it again."
        )
    return len(blocks)
