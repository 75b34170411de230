"""Prompts on the small models of tests/small_models.py, and what a running ComfyUI makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from svdquant_nodes.tools.host.places import ROOT

# What a picture needs around the model, from files of other makers
REPLACED = ("CheckpointLoaderSimple", "CLIPLoader", "VAELoader", "VAEDecode", "SaveImage")
Link = list[Any]  # the node's name and which of its outputs


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def model_file(family: str, seed: int = 0) -> str:
    """What TestSmallModel writes."""
    return f"small-{family}-{seed}.safetensors"


class Graph:
    """A prompt under construction: two texts and two empty latents of a family are there from the start."""

    def __init__(self, family: str, pixels: int) -> None:
        self.family = family
        self.nodes = {
            "positive": node("TestSmallPrompt", family=family, seed=1),
            "negative": node("TestSmallPrompt", family=family, seed=2),
            "latent": node("EmptyLatentImage", width=pixels, height=pixels, batch_size=2),
        }
        self.texts: tuple[Link, Link] = (["positive", 0], ["negative", 0])

    def add(self, kind: str, **inputs: Any) -> Link:
        """A node; what its first output is called."""
        name = f"node {len(self.nodes)}"
        self.nodes[name] = node(kind, **inputs)
        return [name, 0]

    def exact(self, seed: int = 0) -> Link:
        """The 16-bit model by the host's own loader."""
        return self.add("UNETLoader", unet_name=model_file(self.family, seed), weight_dtype="default")

    def sample(self, model: Link, texts: tuple[Link, Link] | None = None) -> Link:
        """Two pictures with guidance."""
        positive, negative = texts or self.texts
        how = dict(seed=5, steps=2, cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0)
        what = dict(model=model, positive=positive, negative=negative, latent_image=["latent", 0])
        return self.add("KSampler", **what, **how)

    def save(self, name: str, samples: Link) -> None:
        """Keep a latent under this name."""
        self.nodes[name] = node("SaveLatent", samples=samples, filename_prefix=f"{self.family}/{name}")


def saved(comfy: Any, nodes: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Run a prompt; the latents it saved, by the names of the nodes that did."""
    outputs = comfy.client.run(nodes).outputs
    files = {name: file for name, output in outputs.items() for file in output.get("latents", ())}
    folder = comfy.base_dir / "output"
    return {
        name: load_file(folder / file["subfolder"] / file["filename"])["latent_tensor"]
        for name, file in files.items()
    }


def on_small_model(
    template: str, family: str, loader: dict[str, Any], pixels: int, encoder: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A workflow in two steps: a small model and its LoRA for its files, a random text for its encoder's.

    encoder  what loads a small encoder, where the text is to be encoded
    """
    graph = json.loads((ROOT / "workflows" / "api" / f"{template}.json").read_text(encoding="utf-8"))
    for name, old in list(graph.items()):
        kind, inputs = old["class_type"], old["inputs"]
        if kind == "SVDQuantLoadModel":
            graph[name] = loader
        elif kind == "SVDQuantLoadTextEncoder" and encoder:
            graph[name] = encoder
        elif kind == "CLIPTextEncode" and not encoder:
            graph[name] = node("TestSmallPrompt", family=family, seed=1 if inputs["text"] else 2)
        elif kind == "SVDQuantApplyLora":
            inputs["lora_name"] = f"small-{family}.safetensors"
        elif kind.startswith("Empty"):
            inputs |= {"width": pixels, "height": pixels}
        elif kind == "SVDQuantSample":
            inputs["steps"] = 2
            graph["save"] = node("SaveLatent", samples=[name, 0], filename_prefix=f"{family}/{template}")
        elif kind in REPLACED:
            del graph[name]
    return graph


def write_lora(models: Path, family: str, rank: int = 4) -> None:
    """On every third linear in a block, under ComfyUI's own names."""
    draw, tensors = np.random.default_rng(7), {}
    with safe_open(models / "diffusion_models" / model_file(family), "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    inside = [n for n, shape in shapes.items() if re.search(r"block|layers", n) and len(shape) == 2]
    for name in [name for name in inside if min(shapes[name]) >= 128][::3]:
        module, (n, k) = f"diffusion_model.{name.removesuffix('.weight')}", shapes[name]
        tensors[f"{module}.lora_B.weight"] = (draw.standard_normal((n, rank)) * 0.3).astype("float32")
        tensors[f"{module}.lora_A.weight"] = (draw.standard_normal((rank, k)) / k**0.5).astype("float32")
    save_file(tensors, models / "loras" / f"small-{family}.safetensors")
