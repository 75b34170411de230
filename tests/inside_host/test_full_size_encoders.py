"""Text encoders in full size, by the names and shapes of the host's classes: what is quantized, and what files take."""

from __future__ import annotations

import importlib
import json
import math
import re

import comfy.ops
import comfy.sd
import pytest
import torch

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.encoders import recognise
from svdquant_nodes.svdquant.adapters.families import resolve
from svdquant_nodes.tests import small_encoders
from svdquant_nodes.tests.loaders import made

BF16, GB = 2, 1e9
CASES = {  # module and class, settings; what we and the host call it; linears; GB in bf16 and in 4 bits
    "qwen3-4b": ("llama", "Qwen3_4B", {}, "Qwen3", "QWEN3_4B", 36 * 7, 8.04, 2.71),
    "qwen3-8b": ("llama", "Qwen3_8B", {"lm_head": True}, "Qwen3", "QWEN3_8B", 36 * 7, 16.38, 6.18),
    "qwen2.5-vl-7b": ("llama", "Qwen25_7BVLI", {}, "Qwen2.5-VL", "QWEN25_7B", 28 * 7, 15.49, 5.91),
    "qwen2.5-vl-3b-text": ("llama", "Qwen25_3B", {}, "Qwen2.5-VL", "QWEN25_3B", 36 * 7, 6.17, 2.1),
    "ovis": ("llama", "Ovis25_2B", {}, "Qwen3", "QWEN3_2B", 28 * 7, 3.44, 1.37),
    "gemma-2-2b": ("llama", "Gemma2_2B", {}, "Gemma 2", "GEMMA_2_2B", 26 * 7, 5.23, 2.26),
    "gemma-3-4b": ("llama", "Gemma3_4B", {}, "Gemma 3", "GEMMA_3_4B", 34 * 7, 7.76, 3.05),
    "gemma-3-12b": ("llama", "Gemma3_12B", {}, "Gemma 3", "GEMMA_3_12B", 48 * 7, 24.37, 8.57),
    "llama-3.1-8b": ("llama", "Llama2", {}, "Llama 3.1", "LLAMA3_8", 32 * 7, 15.01, 4.76),
    "mistral-24b": ("llama", "Mistral3Small24B", {}, "Mistral", "MISTRAL3_24B", 40 * 7, 45.8, 13.15),
    "mistral-24b-30-layers": (
        "llama",
        "Mistral3Small24B",
        {"num_hidden_layers": 30, "final_norm": False},
        "Mistral",
        "MISTRAL3_24B_PRUNED_FLUX2",
        30 * 7,
        34.69,
        10.2,
    ),
    "umt5-xxl": ("t5", "T5", "umt5_config_xxl.json", "UMT5", "T5_XXL", 24 * 7, 11.36, 4.56),
    "t5-1.0-xxl": ("t5", "T5", "t5_old_config_xxl.json", "T5 1.0", "T5_XXL_OLD", 24 * 6, 9.73, 2.63),
    "qwen3-vl-4b": ("qwen3vl", "qwen3vl_4b", {}, "Qwen3-VL", "QWEN3VL_4B", 36 * 7, 8.88, 3.54),
    "qwen3-vl-8b": ("qwen3vl", "qwen3vl_8b", {}, "Qwen3-VL", "QWEN3VL_8B", 36 * 7, 17.53, 7.33),
}
KNOWN = [name for name, case in CASES.items() if hasattr(comfy.sd.TEModel, case[4])]


def shapes_of(name):
    """Every tensor of the 16-bit file, and which of the host's modules are linears in blocks."""
    module, build, settings, row, *_ = CASES[name]
    if isinstance(settings, str):
        settings = json.loads((small_encoders.HERE / settings).read_text())
    found = importlib.import_module(f"comfy.text_encoders.{module}")
    build = found._make_qwen3vl_model(build) if module == "qwen3vl" else getattr(found, build)
    model = build(settings, torch.bfloat16, "meta", comfy.ops.manual_cast)
    state = {small_encoders.published(row, n): tuple(t.shape) for n, t in model.state_dict().items()}
    linear = {
        small_encoders.published(row, n) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    return state, {n for n in linear if re.match(r"(model\.(language_model\.)?layers|encoder\.block)\.", n)}


def in_4_bits(shapes, linears):
    stored = {}
    for name, shape in shapes.items():
        layer, _, tail = name.rpartition(".")
        if layer in linears and tail == "weight":
            n, k = shape
            stored[f"{layer}.nibbles"] = ("U8", [n, k // 2])
            stored |= {f"{layer}.{field}": ("F16", [n, k // 128]) for field in ("scales", "zeros")}
        else:
            stored[name] = ("BF16", list(shape))
    return stored


@pytest.mark.parametrize("name", KNOWN)
def test_every_linear_of_a_block_and_nothing_else(tmp_path, name):
    *_, row, model, count, sixteen, four = CASES[name]
    shapes, linears = shapes_of(name)
    more = small_encoders.tokenizer(row)
    found = recognise([*shapes, *more])
    quantized = {n for n in linears if re.fullmatch(found.linears, n)}
    assert (found.name, len(quantized)) == (row, count) and quantized == linears
    assert all(shapes[f"{n}.weight"][1] % 128 == 0 and shapes[f"{n}.weight"][0] % 4 == 0 for n in linears)
    meta = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
    assert comfy.sd.detect_te_model(meta) == comfy.sd.TEModel[model]
    stored = in_4_bits(shapes, linears) | {n: ("U8", [len(t)]) for n, t in more.items()}
    path, size = made.sparse(tmp_path / "int4.safetensors", stored)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.dialect, resolve(checkpoint).name) == ("natural", row)
    assert set(checkpoint.info) == linears
    dense = sum(math.prod(shape) for shape in shapes.values()) * BF16
    assert (round(dense / GB, 2), round(size / GB, 2)) == (sixteen, four)
