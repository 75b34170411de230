"""Files made for a test: raw bytes, single layers, and the header of a full FLUX.1-dev without its bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdquant_nodes.loaders.tensorfile import DTYPES
from svdquant_nodes.tests import golden

V2_NAMES = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
PLAIN = {"x_embedder.weight": torch.ones(4, 4, dtype=torch.bfloat16)}


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, JSON or bytes, and these data bytes, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file by the safetensors library, which knows nothing of ours."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def layer(name: str, prefix: str = "c0", file: str = "svdq_int4_linear") -> dict[str, Tensor]:
    """A golden linear's stored tensors under a layer name."""
    return {f"{name}.{tail}": t for tail, t in golden.case(file, f"{prefix}.packed").items()}


def as_v2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under v2 names."""
    renamed = {}
    for name, tensor in tensors.items():
        head, _, tail = name.rpartition(".")
        renamed[f"{head}.{V2_NAMES.get(tail, tail)}"] = tensor
    return renamed


def same(got: Tensor, want: Tensor) -> bool:
    """Equal to the bit, dtype and shape included; NaN and -0 too."""
    alike = got.dtype == want.dtype and got.shape == want.shape
    return alike and torch.equal(_bytes(got), _bytes(want))


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def same_tensors(got, want) -> bool:
    """Two mappings hold the same names and bits."""
    return set(got) == set(want) and all(same(got[name], want[name]) for name in want)


# ---- FLUX.1-dev in full size: shapes only ----


Shapes = dict[str, tuple[str, list[int]]]


def w4a4(n: int, k: int, *, fp4: bool, second: str = "wtscale") -> Shapes:
    """A W4A4 layer's tensors by the last part of their v1 names."""
    group, scale = (16, "F8_E4M3") if fp4 else (64, "BF16")
    extra = {second: ("BF16", [1] if second == "wtscale" else [n])} if fp4 else {}
    return {
        "qweight": ("I8", [n, k // 2]),
        "wscales": (scale, [k // group, n]),
        "bias": ("BF16", [n]),
        "smooth": ("BF16", [k]),
        "smooth_orig": ("BF16", [k]),
        "lora_down": ("BF16", [k, 32]),
        "lora_up": ("BF16", [n, 32]),
        **extra,
    }


def awq(n: int, k: int) -> Shapes:
    """A modulation's."""
    scale = ("BF16", [k // 64, n])
    return {"qweight": ("I32", [n // 4, k // 2]), "wscales": scale, "wzeros": scale, "bias": ("BF16", [n])}


def dense(*shape: int) -> Shapes:
    """A 16-bit linear's, with a bias."""
    return {"weight": ("BF16", list(shape)), "bias": ("BF16", [shape[0]])}


def _norm() -> Shapes:
    return {"weight": ("BF16", [128])}


def flux_dev_shapes(*, fp4: bool = False, d: int = 3072, double: int = 19, single: int = 38) -> dict:
    """Every tensor of FLUX.1-dev in Nunchaku layout: {name: (dtype, shape)}, width and depths as asked."""
    modules: dict[str, dict] = {
        "x_embedder": dense(d, 64),
        "context_embedder": dense(d, 4096),
        "norm_out.linear": dense(2 * d, d),
        "proj_out": dense(64, d),
    }
    for name, width in (("timestep", 256), ("guidance", 256), ("text", 768)):
        modules[f"time_text_embed.{name}_embedder.linear_1"] = dense(d, width)
        modules[f"time_text_embed.{name}_embedder.linear_2"] = dense(d, d)
    for i in range(double):
        block = f"transformer_blocks.{i}."
        for end, norms in (("", ("norm_q", "norm_k")), ("_context", ("norm_added_q", "norm_added_k"))):
            modules[f"{block}norm1{end}.linear"] = awq(6 * d, d)
            modules[f"{block}qkv_proj{end}"] = w4a4(3 * d, d, fp4=fp4, second="wcscales")
            modules[f"{block}out_proj{end}"] = w4a4(d, d, fp4=fp4)
            modules[f"{block}mlp{end}_fc1"] = w4a4(4 * d, d, fp4=fp4)
            modules[f"{block}mlp{end}_fc2"] = w4a4(d, 4 * d, fp4=fp4)
            modules |= {block + norm: _norm() for norm in norms}
    for i in range(single):
        block = f"single_transformer_blocks.{i}."
        modules[f"{block}norm.linear"] = awq(3 * d, d)
        modules[f"{block}qkv_proj"] = w4a4(3 * d, d, fp4=fp4, second="wcscales")
        modules[f"{block}mlp_fc1"] = w4a4(4 * d, d, fp4=fp4)
        modules[f"{block}out_proj"] = w4a4(d, d, fp4=fp4)
        modules[f"{block}mlp_fc2"] = w4a4(d, 4 * d, fp4=fp4)
        modules |= {block + norm: _norm() for norm in ("norm_q", "norm_k")}
    return {f"{m}.{tail}": value for m, tails in modules.items() for tail, value in tails.items()}


def t5_xxl_shapes() -> Shapes:
    """Every tensor of the published T5-XXL."""
    d, ff = 4096, 10240
    table = ("F16", [32128, d])
    shapes = {"shared.weight": table, "encoder.embed_tokens.weight": table}
    shapes["encoder.final_layer_norm.weight"] = ("F16", [d])
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = ("F16", [32, 64])
    linears = {f"0.SelfAttention.{name}": (d, d) for name in "qkvo"}
    linears |= {
        f"1.DenseReluDense.{name}": (n, k) for name, n, k in (("wi_0", ff, d), ("wi_1", ff, d), ("wo", d, ff))
    }
    for block in range(24):
        prefix = f"encoder.block.{block}.layer."
        shapes |= {f"{prefix}{layer}.layer_norm.weight": ("F16", [d]) for layer in (0, 1)}
        for name, (n, k) in linears.items():
            shapes[f"{prefix}{name}.qweight"] = ("I16", [n // 4, k])
            shapes |= {
                f"{prefix}{name}.{tail}": ("F16", [k // 128, n]) for tail in ("scales", "scaled_zeros")
            }
    return shapes


def sparse(path: Path, shapes: Shapes, contents: dict[str, bytes] | None = None) -> tuple[Path, int]:
    """A file of the right size whose tensor bytes are a hole but for `contents`, and how many it claims."""
    header, position = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    start = raw(path, header).stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(start + position)
        for name, data in (contents or {}).items():
            stream.seek(start + header[name]["data_offsets"][0])
            stream.write(data)
    return path, position
