"""What reading a LoRA file refuses, in one sentence each."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.loaders.lora import read_lora
from svdquant_nodes.tests.loaders import made

GOOD = torch.ones(2, 2)


def test_fp8_is_read_as_bf16(tmp_path):
    path = made.save(tmp_path / "a.safetensors", {"x.lora_up.weight": GOOD.to(torch.float8_e4m3fn)})
    assert read_lora(path)["x.lora_up.weight"].dtype == torch.bfloat16


def test_whole_numbers_are_kept_where_trainers_keep_them(tmp_path):
    path = made.save(tmp_path / "a.safetensors", {"x.alpha": torch.tensor(8), "x.lora_up.weight": GOOD})
    assert int(read_lora(path)["x.alpha"]) == 8


@pytest.mark.parametrize("end", [".pt", ".ckpt", ".bin", ".pth"])
def test_pickles_are_refused_by_name(tmp_path, end):
    with pytest.raises(ValueError, match=rf"lora\{end}: expected .safetensors, got a pickle"):
        read_lora(tmp_path / f"lora{end}")


BAD = {
    "empty-file": ({}, "expected LoRA tensors, got an empty file"),
    "nan": (
        {"x.lora_up.weight": GOOD * float("nan")},
        r"x\.lora_up\.weight: expected finite numbers, got NaN",
    ),
    "infinity": ({"x.alpha": torch.tensor(float("inf"))}, r"x\.alpha: expected finite numbers"),
    "fp8-nan": (
        {"x.lora_up.weight": (GOOD * float("nan")).to(torch.float8_e4m3fn)},
        "expected finite numbers, got NaN",
    ),
    "quantized-lora": (
        {"x.lora_up.weight": GOOD.to(torch.int8)},
        "expected floating-point numbers, got int8",
    ),
    "whole-model": ({"x.qweight": GOOD.to(torch.int8)}, "expected a LoRA, got a quantized model"),
}


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_refused(tmp_path, tensors, message):
    path = made.save(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{message}"):
        read_lora(path)
