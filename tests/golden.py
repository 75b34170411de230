"""Golden vectors: what the reference packers and maths made, with the natural tensors they were made from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from svdquant_nodes.svdquant.core.int4 import pack_nibbles
from svdquant_nodes.svdquant.core.weights import AWQ, INT4, INT4_UNSIGNED, NVFP4, LinearWeights

FOLDER = Path(__file__).parent / "data" / "golden"


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def parameters(name: str) -> dict[str, dict]:
    """The JSON parameters of every case, from the header."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {case: json.loads(text) for case, text in file.metadata().items()}


def case(name: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of one case, without its prefix."""
    return {k.removeprefix(f"{prefix}."): t for k, t in tensors(name).items() if k.startswith(f"{prefix}.")}


def int4_linear(prefix: str) -> LinearWeights:
    """An int4 case from its natural tensors; one with a shift comes out unsigned, its bias compensated."""
    t = case("svdq_int4_linear", f"{prefix}.logical")
    return LinearWeights(
        INT4_UNSIGNED if "shift" in t else INT4,
        codes=pack_nibbles(t["q"]),
        scales=t["scale"],
        smooth=t["smooth"],
        down=t["lora_down"],
        up=t["branch_b"],
        bias=t.get("bias_final", t["bias"]),
    )


def nvfp4_linear(prefix: str) -> LinearWeights:
    t = case("svdq_nvfp4_linear", f"{prefix}.logical")
    return LinearWeights(
        NVFP4,
        codes=pack_nibbles(t["code"]),
        scales=t["subscale_e4m3"],
        second_scale=t["scale0"],
        smooth=t["smooth"],
        down=t["lora_down"],
        up=t["branch_b"],
        bias=t["bias"],
    )


def interleave(rows: Tensor, splits: int) -> Tensor:
    """Modulation row order: stored row j * splits + s is original row s * d + j."""
    d = rows.shape[0] // splits
    return rows.unflatten(0, (splits, d)).transpose(0, 1).flatten(0, 1)


def awq_linear(prefix: str) -> LinearWeights:
    """A modulation case in stored row order with its folded +1, as a forward runs it."""
    splits = parameters("awq_w4a16")[prefix]["adanorm_splits"]
    t = case("awq_w4a16", prefix)
    codes = interleave(t["logical.q_signed"].to(torch.int16) + 7, splits)
    return LinearWeights(
        AWQ,
        codes=pack_nibbles(codes),
        scales=t["packed.wscales"].T.contiguous(),
        zeros=t["packed.wzeros"].T.contiguous(),
        bias=t["packed.bias"],
    )
