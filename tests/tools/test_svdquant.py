"""tools/svdquant from a shell: output, JSON, one-sentence errors, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.tests import golden
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tools.commands import bake_lora, convert, quantize

ROOT = Path(__file__).resolve().parents[2]
MINI = golden.FOLDER / "mini_flux_int4.safetensors"


def shell(*arguments, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "svdquant"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_inspect_prints_every_layer():
    done = shell("inspect", MINI)
    assert done.returncode == 0 and done.stderr == ""
    assert "nunchaku_v1, FLUX.1" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "transformer_blocks.0.mlp_context_fc2 " in line)
    assert all(word in line for word in ("int4", "128x256", "rank 16", "0.171875"))


def test_inspect_json_is_a_record_of_the_file():
    found = json.loads(shell("inspect", MINI, "--json").stdout)
    assert (found["dialect"], found["family"], len(found["layers"])) == ("nunchaku_v1", "FLUX.1", 15)
    assert found["plain_tensors"] == 10 and found["warnings"] == []
    assert sum(layer["nbytes"] for layer in found["layers"]) == found["quantized_bytes"]


def test_convert_says_what_it_made(tmp_path):
    done = shell("convert", MINI, tmp_path / "a.safetensors", "--to", "natural")
    assert done.returncode == 0 and done.stderr == ""
    assert "natural, 15 layers" in done.stdout and (tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_bad_file_is_one_sentence_and_exit_code_2(tmp_path, command):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\x04\x95" + bytes(64))
    rest = ["b.safetensors", "--to", "natural"] if command == "convert" else []
    done = shell(command, path, *rest, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "error: model.safetensors: expected a safetensors file, got a Python pickle"
    )
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_ordinary_model_names_the_stock_node(tmp_path):
    done = shell("inspect", made.save(tmp_path / "a.safetensors", made.PLAIN))
    assert done.returncode == 2 and "Load Diffusion Model (UNETLoader)" in done.stderr


def test_python_without_torch_and_no_environment_says_what_to_do(tmp_path):
    """-S leaves out site-packages, and with them torch."""
    command = [sys.executable, "-S", str(ROOT / "tools" / "svdquant"), "inspect", str(MINI)]
    environment = {**os.environ, "SVDQUANT_VENV": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: torch and einops are not installed here. Use the Python")


DEMO_BF16 = ROOT / "demo" / "diffusion_models" / "svdquant-demo-bf16.safetensors"
DEMO_INT4 = DEMO_BF16.with_name("svdquant-demo-int4.safetensors")
DEMO_LORA = ROOT / "demo" / "loras" / "svdquant-demo-lora.safetensors"


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (["a"], "a: expected the name of a file ending in .safetensors"),
        (["."], ".: expected the name of a file ending in .safetensors"),
        (["a.safetensors", "--device", "tpu"], "--device tpu: expected a device that torch has here"),
        (["a.safetensors", "--device", "meta:9x"], "--device meta:9x: expected a device"),
        (["a.safetensors", "--device", "meta"], "--device meta: expected a device that torch has here"),
        (["a.safetensors", "--budget", "1..2MB"], "--budget: expected a size such as 6.5GB"),
        (["a.safetensors", "--error", "-3"], "--error: expected a percentage above 0"),
        (["a.safetensors", "--formats", "int4"], "--formats: expected --budget or --error beside it"),
        (
            ["a.safetensors", "--layer", "mlp_fc2=plain"],
            "mlp_fc2: expected a pattern that matches some of the 20",
        ),
    ],
    ids=[
        "no-ending",
        "a-folder",
        "no-such-device",
        "no-device-at-all",
        "device-without-memory",
        "no-size",
        "no-error",
        "formats-of-nothing",
        "pattern-of-nothing",
    ],
)
def test_quantize_refuses_in_one_sentence_before_it_works(tmp_path, rest, reason):
    done = shell("quantize", DEMO_BF16, *rest, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {reason}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["convert", "--to", "natural"], ["bake-lora", "lora.safetensors"]])
def test_a_name_that_comfyui_would_not_list_is_refused(tmp_path, command):
    name, *rest = command
    middle, flags = ([], rest) if rest[0].startswith("--") else (rest, [])
    done = shell(name, MINI, *middle, tmp_path / "a", *flags)
    assert done.returncode == 2 and "ending in .safetensors" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [convert, bake_lora, quantize], ids=["convert", "bake-lora", "quantize"])
def test_a_file_that_is_there_is_kept_unless_asked(tmp_path, command):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"hours of work")
    words = {
        convert: [DEMO_INT4, target, "--to", "natural"],
        bake_lora: [DEMO_INT4, DEMO_LORA, target],
        quantize: [DEMO_BF16, target, "--rank", "0", "--quiet"],
    }[command]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ValueError, match=r"got one that is there\. Name another, or add --overwrite"):
        command.main(parser.parse_args(list(map(str, words))))
    assert target.read_bytes() == b"hours of work" and list(tmp_path.iterdir()) == [target]
    assert command.main(parser.parse_args([*map(str, words), "--overwrite"])) == 0
    assert len(open_checkpoint(target).info) == 20 and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("told", "message"), [("", "RuntimeError"), ("CUDA error: no device\nmore", "CUDA error: no device")]
)
def test_a_device_that_fails_is_told_with_what_there_is_to_say(monkeypatch, told, message):
    monkeypatch.setattr(quantize.torch, "zeros", Mock(side_effect=RuntimeError(told)))
    with pytest.raises(ValueError, match=f"--device cuda: expected .* got: {message}\\. Use cpu"):
        quantize.check_device("cuda")


def test_wrong_usage_is_exit_code_2():
    assert shell("convert", MINI, "b.safetensors", "--to", "gguf").returncode == 2
    assert shell("quantise").returncode == 2


def test_reader_that_closes_early_is_no_error():
    script = ROOT / "tools" / "svdquant"
    pipe = f"{sys.executable} {script} inspect {MINI} --json | head -1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True)
    assert done.stdout == "{\n" and done.stderr == ""
