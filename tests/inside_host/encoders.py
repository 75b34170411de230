"""A small T5 as the published file holds one, and the host's own fp32 encoder on the weights that its codes stand for.

Codes are drawn and laid out here by the formula of the format, so that neither our readers nor our writers take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from svdquant_nodes.tests import oracle
from svdquant_nodes.tests.loaders import made

WIDTH, INNER, HIDDEN, HEADS, WORDS = 128, 128, 256, 2, 32128
LINEARS = {
    "layer.0.SelfAttention.q": (INNER, WIDTH),
    "layer.0.SelfAttention.k": (INNER, WIDTH),
    "layer.0.SelfAttention.v": (INNER, WIDTH),
    "layer.0.SelfAttention.o": (WIDTH, INNER),
    "layer.1.DenseReluDense.wi_0": (HIDDEN, WIDTH),
    "layer.1.DenseReluDense.wi_1": (HIDDEN, WIDTH),
    "layer.1.DenseReluDense.wo": (WIDTH, HIDDEN),
}


@dataclass(frozen=True)
class Encoder:
    """The tensors of a published file, and the dense fp32 ones they mean, under the same module names."""

    stored: dict[str, Tensor]
    dense: dict[str, Tensor]


def small(blocks: int = 2, seed: int = 0, loud: float = 1.0) -> Encoder:
    """A T5 of the real vocabulary, 128 wide; `loud` scales the outputs of its MLPs."""
    draw = torch.Generator().manual_seed(seed)
    plain = {"shared.weight": torch.randn(WORDS, WIDTH, generator=draw)}
    plain["encoder.final_layer_norm.weight"] = torch.rand(WIDTH, generator=draw) + 0.5
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    plain[bias] = torch.randn(32, HEADS, generator=draw)
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for block in range(blocks):
        prefix = f"encoder.block.{block}."
        for layer in (0, 1):
            plain[f"{prefix}layer.{layer}.layer_norm.weight"] = torch.rand(WIDTH, generator=draw) + 0.5
        for name, (n, k) in LINEARS.items():
            tensors, weight = linear(n, k, draw, loud if name.endswith("wo") else 1.0)
            stored |= {f"{prefix}{name}.{tail}": t for tail, t in tensors.items()}
            dense[f"{prefix}{name}.weight"] = weight
    plain = {name: t.half() for name, t in plain.items()}
    again = {"encoder.embed_tokens.weight": plain["shared.weight"]}
    return Encoder(stored | plain | again, dense | {name: t.float() for name, t in plain.items()})


def gaussian(seed: int = 0) -> Encoder:
    """The same with Gaussian fp16 weights that no code stands for; nothing is stored.

    q is smaller by the root of the heads' width, as T5 begins: its attention divides by nothing.
    """
    draw, encoder = torch.Generator().manual_seed(seed), small(seed=seed)
    drawn = {}
    for name, t in encoder.dense.items():
        if any(name.endswith(f"{linear}.weight") for linear in LINEARS):
            size = (t.shape[1] * (INNER // HEADS if name.endswith("q.weight") else 1)) ** -0.5
            drawn[name] = (torch.randn(t.shape, generator=draw) * size).half().float()
    return Encoder({}, encoder.dense | drawn)


def linear(n: int, k: int, draw: torch.Generator, size: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
    """One stored linear, and its weight: code * scale + zero, in groups of 128."""
    codes = torch.randint(0, 16, (n, k), generator=draw)
    scales = (torch.rand(n, k // 128, generator=draw) + 0.5).mul(0.2 * size * k**-0.5).half()
    zeros = (-scales.float() * (torch.rand(n, k // 128, generator=draw) * 3 + 6)).half()
    spread = [t.double().repeat_interleave(128, 1) for t in (scales, zeros)]
    nibbles = torch.empty(n * k, dtype=torch.int64)
    nibbles[oracle.p7(torch.arange(n)[:, None], torch.arange(k), k).flatten()] = codes.flatten()
    packed = (nibbles[0::2] | nibbles[1::2] << 4).to(torch.uint8).view(torch.int16)
    rows = torch.zeros(8 - k // 128, n).half()  # T5 files pad scale rows to a multiple of 8
    tensors = {
        "qweight": packed.reshape(n // 4, k),
        "scales": torch.cat((scales.T, rows)),
        "scaled_zeros": torch.cat((zeros.T, rows)),
    }
    return tensors, (codes.double() * spread[0] + spread[1]).float()


def write(path: Path, encoder: Encoder) -> Path:
    """The published file."""
    return made.save(path, encoder.stored, {"model_class": "NunchakuT5EncoderModel"})


def host_clip(encoder: Encoder, kind: str = "pixart", *others: dict[str, Tensor]) -> Any:
    """The host's own CLIP in fp32; `others` are the state dicts beside T5's."""
    state = {name: t.clone() for name, t in encoder.dense.items()}
    sizes = dict(vocab_size=WORDS, d_model=WIDTH, num_heads=HEADS, d_kv=INNER // HEADS, d_ff=HIDDEN)
    sizes["num_layers"] = 1 + max(int(name.split(".")[2]) for name in state if ".block." in name)
    options = {"dtype": torch.float32, "t5xxl_model_config": sizes}
    kind = getattr(comfy.sd.CLIPType, kind.upper())
    return comfy.sd.load_text_encoder_state_dicts([state, *others], clip_type=kind, model_options=options)


def encode(clip: Any, text: str = "a (red:1.3) fox under an oak, painted in oils") -> Tensor:
    """What CLIPTextEncode makes of a prompt: the embedding alone."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


def lora(seed: int = 5, rank: int = 4) -> dict[str, Tensor]:
    """On some linears and the token table, under the names that any trainer's become."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name in ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"):
        n, k = LINEARS[name]
        module = f"text_encoders.t5xxl.transformer.encoder.block.1.{name}"
        tensors[f"{module}.lora_up.weight"] = torch.randn(n, rank, generator=draw) * 0.3
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, k, generator=draw) / k**0.5
    return tensors


def empty_clip_l(path: Path) -> Path:
    """CLIP-L's names and sizes with zeros behind them, which take no room on the disk."""
    width, inner = 768, 3072
    shapes = {
        "embeddings.token_embedding.weight": [49408, width],
        "embeddings.position_embedding.weight": [77, width],
    }
    modules = {"final_layer_norm": [width]}
    for i in range(12):
        layer = f"encoder.layers.{i}."
        modules |= {
            f"{layer}self_attn.{x}": [width, width] for x in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        modules |= {f"{layer}mlp.fc1": [inner, width], f"{layer}mlp.fc2": [width, inner]}
        modules |= {f"{layer}layer_norm{x}": [width] for x in (1, 2)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return made.sparse(path, {f"text_model.{name}": ("F16", shape) for name, shape in shapes.items()})[0]
