"""Layers that a LoRA has as one and the model as several: q, k and v trained together, a value and its gate.

What a fused layer adds is up @ down with the parts' rows of `up` one below the other, so each part gets its rows of
what has rows and the whole of the rest: exact for every adapter listed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

# A fused module's last words, with dots or underscores between them, and the parts in the order of their rows.
_PARTS = tuple(
    (re.compile(rf"(.*[._]){fused.replace('.', '[._]')}"), parts)
    for fused, parts in (
        ("attention.to_qkv", ("attention.qkv",)),
        ("to_qkv", ("to_q", "to_k", "to_v")),
        ("to_kv", ("to_k", "to_v")),
        ("add_qkv_proj", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ("feed_forward.net.0.proj", ("feed_forward.w3", "feed_forward.w1")),  # diffusers' SwiGLU: value, gate
        ("feed_forward.net.2", ("feed_forward.w2",)),
    )
)
_BY_ROWS = ("lora_up.weight", "diff", "diff_b", "dora_scale", "hada_w1_a", "hada_w2_a")
_SHARED = ("lora_down.weight", "alpha", "hada_w1_b", "hada_w2_b")


def parts_of(module: str) -> Iterator[tuple[str, ...]]:
    """The modules that a fused one may consist of, in its spelling, the fewest first."""
    for pattern, parts in _PARTS:
        match = pattern.fullmatch(module)
        if match:
            yield tuple(match.group(1) + part for part in parts)


def share(path: Path, name: str, tail: str, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """What each of `count` parts gets of a fused layer's tensor: its rows, or all of it.

    name    of the tensor in the file
    tail    what it is, by its canonical name

    Raises ValueError where the rows do not come out even, or the adapter cannot be cut by rows.
    """
    if count == 1 or tail in _SHARED:
        return (tensor,) * count
    columns_only = tail == "dora_scale" and tensor.ndim > 1 and tensor.shape[0] == 1
    if tail not in _BY_ROWS or columns_only or not tensor.ndim:
        raise ValueError(
            f"{path.name}: {name}: this model has the layer in {count} parts; expected an adapter that can be cut by "
            "rows (LoRA, LoHa, a full difference), got another. Use one trained on the parts."
        )
    if tensor.shape[0] % count:
        raise ValueError(
            f"{path.name}: {name}: expected rows for {count} parts of one size, got {tensor.shape[0]}. "
            "The LoRA was made for another model; choose one made for this one."
        )
    return tensor.chunk(count)
