"""4-bit text encoders in a running ComfyUI: our nodes make and load them, ComfyUI's own nodes encode and patch."""

from __future__ import annotations

import json

import pytest

from svdquant_nodes.tests.host.small_graphs import model_file, node, on_small_model, saved
from svdquant_nodes.tests.tolerances import distance

PLAIN = [["encoder.final_layer_norm.weight", [128]], ["shared.weight", [32128, 128]]]


@pytest.fixture(scope="module")
def files(comfy):
    """A narrow T5 with the depth and MLP by which ComfyUI knows T5-XXL, in 4 bits, and two small ones in 16."""
    import torch
    from safetensors.torch import save_file

    folder = comfy.base_dir / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    save_file(four_bits(draw), folder / "t5-int4.safetensors")
    save_file(sixteen_bits(draw), folder / "t5-fp16.safetensors")
    save_file(sixteen_bits(draw), folder / "t5-another.safetensors")
    return folder


def around(draw, blocks):
    """What is not a linear."""
    import torch

    plain = {name: torch.randn(shape, generator=draw).half() for name, shape in PLAIN}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    plain[bias] = torch.randn(32, 2, generator=draw).half()
    norms = [f"encoder.block.{block}.layer.{i}.layer_norm.weight" for block in range(blocks) for i in (0, 1)]
    return plain | {name: torch.ones(128).half() for name in norms}


def linears(blocks, hidden):
    for block in range(blocks):
        for name in "qkvo":
            yield f"encoder.block.{block}.layer.0.SelfAttention.{name}", 128, 128
        for name, n, k in (("wi_0", hidden, 128), ("wi_1", hidden, 128), ("wo", 128, hidden)):
            yield f"encoder.block.{block}.layer.1.DenseReluDense.{name}", n, k


def four_bits(draw, blocks=24, hidden=10240):
    import torch

    tensors = around(draw, blocks)
    for name, n, k in linears(blocks, hidden):
        tensors[f"{name}.qweight"] = torch.randint(-(2**15), 2**15, (n // 4, k), generator=draw).short()
        rows, scale = -(-k // 1024) * 8, 0.2 * k**-0.5
        tensors[f"{name}.scales"] = torch.full((rows, n), scale).half()
        tensors[f"{name}.scaled_zeros"] = torch.full((rows, n), -7.5 * scale).half()
    return tensors


def sixteen_bits(draw, blocks=2, hidden=256):
    import torch

    made = {}
    for name, n, k in linears(blocks, hidden):
        size = (k * (64 if name.endswith(".q") else 1)) ** -0.5  # T5's attention divides by nothing
        made[f"{name}.weight"] = (torch.randn(n, k, generator=draw) * size).half()
    return made | around(draw, blocks)


def prompt(**nodes):
    """Load, encode, and show the numbers as text."""
    loaded = {"text_encoder1": "t5-int4.safetensors", "text_encoder2": "none", "type": "pixart"}
    graph = {
        "load": {"class_type": "SVDQuantLoadTextEncoder", "inputs": loaded},
        "encode": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["load", 0], "text": "a (red:1.2) fox"},
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["encode", 0]}},
    }
    return graph | nodes


def shown(result):
    """The text on the node called show."""
    return result.outputs["show"]["text"][0]


def test_stock_node_encodes(comfy, files):
    first = shown(comfy.client.run(prompt()))
    assert "tensor(" in first and "nan" not in first
    assert shown(comfy.client.run(prompt())) == first


def test_stock_lora_loader_changes_the_encoding_and_back(comfy, files):
    import torch
    from safetensors.torch import save_file

    module = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v"
    lora = {f"{module}.lora_up.weight": torch.ones(128, 4), f"{module}.lora_down.weight": torch.ones(4, 128)}
    folder = comfy.base_dir / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora, folder / "t5-lora.safetensors")
    inputs = {
        "clip": ["load", 0],
        "lora_name": "t5-lora.safetensors",
        "strength_model": 0.0,
        "strength_clip": 1.0,
    }
    model = {"class_type": "SVDQuantLoadModel", "inputs": {"model_name": "svdquant-demo-int4.safetensors"}}
    node = {"class_type": "LoraLoader", "inputs": inputs | {"model": ["model", 0]}}
    encode = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["lora", 1], "text": "a (red:1.2) fox"}}
    before = shown(comfy.client.run(prompt()))
    assert shown(comfy.client.run(prompt(model=model, lora=node, encode=encode))) != before
    assert shown(comfy.client.run(prompt())) == before


@pytest.fixture(scope="module")
def quantized(comfy, files):
    """What the node tells of the 4-bit file that it makes of the small one."""
    inputs = {"source": "t5-fp16.safetensors", "file_name": "made/here"}
    graph = {"1": {"class_type": "SVDQuantQuantizeTextEncoder", "inputs": inputs}}
    return comfy.client.run(graph).outputs["1"]["text"][0]


def test_quantized_here_and_inspected(comfy, files, quantized):
    assert quantized.startswith("here.safetensors: ") and "mean error of weights" in quantized
    assert (files / "made" / "here.safetensors").is_file()
    inspect = {"1": {"class_type": "SVDQuantInspect", "inputs": {"model_name": "made/here.safetensors"}}}
    assert "nunchaku_t5, T5" in json.dumps(comfy.client.run(inspect).outputs)


def test_quantized_here_encodes_what_16_bits_encode(comfy, quantized):
    """Gaussian weights, whose rounding errors of 9 % nothing hides, through two blocks."""
    loaded = {"text_encoder1": "made/here.safetensors", "text_encoder2": "none", "type": "pixart"}
    clips = {
        "4": node("SVDQuantLoadTextEncoder", **loaded),
        "16": node("TestSmallT5", file_name="t5-fp16.safetensors"),
        "another": node("TestSmallT5", file_name="t5-another.safetensors"),
    }
    graph = {}
    for name, clip in clips.items():
        graph[f"{name} clip"] = clip
        graph[f"{name} text"] = node("CLIPTextEncode", clip=[f"{name} clip", 0], text="a (red:1.2) fox")
        graph[f"{name} latent"] = node("TestTextAsLatent", text=[f"{name} text", 0])
        graph[name] = node("SaveLatent", samples=[f"{name} latent", 0], filename_prefix=f"t5/{name}")
    texts = saved(comfy, graph)
    assert texts["4"].shape == texts["16"].shape
    assert 0.01 < distance(texts["4"], texts["16"]).norm < 0.2 < distance(texts["4"], texts["another"]).norm


def test_z_image_with_a_4_bit_encoder_made_here(comfy):
    """The template on a small model and a small Qwen3, which is first quantized by the other template's node."""
    made = {f"clip {seed}": node("TestSmallEncoder", seed=seed) for seed in (0, 1)}
    comfy.client.run({"model": node("TestSmallModel", family="z-image", seed=0), **made})
    names = dict(source="small-qwen3-0.safetensors", file_name="small-qwen3-int4")
    told = comfy.client.run({"1": node("SVDQuantQuantizeTextEncoder", **names)}).outputs["1"]["text"][0]
    assert told.startswith("small-qwen3-int4.safetensors: ") and "model.layers.2.mlp.down_proj" in told
    loaded = dict(text_encoder1="small-qwen3-int4.safetensors", text_encoder2="none", type="lumina2")
    encoders = {
        "4": node("SVDQuantLoadTextEncoder", **loaded),
        "16": node("TestSmallEncoder", seed=0),
        "another": node("TestSmallEncoder", seed=1),
    }
    model = node("UNETLoader", unet_name=model_file("z-image"), weight_dtype="default")
    graphs = {
        n: on_small_model("z-image-low-memory", "z-image", model, 64, one) for n, one in encoders.items()
    }
    drawn = {name: saved(comfy, graph)["save"] for name, graph in graphs.items()}
    far = {name: distance(drawn[name], drawn["16"]).norm for name in ("4", "another")}
    assert 0 < far["4"] < far["another"] / 2
