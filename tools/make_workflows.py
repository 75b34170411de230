"""Write every file of workflows/: one description, two forms.

    python tools/make_workflows.py            # with the Python of .venv; starts the ComfyUI of .hosts

`workflows/api/NAME.json` is what the headless API takes; `workflows/NAME.json` is the graph the web UI opens. The UI
form stores widget values by position, so the order of a node's inputs is asked of a running host.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pack

pack.alias()
from svdquant_nodes.tools.host import places  # noqa: E402
from svdquant_nodes.tools.host.server import ComfyServer  # noqa: E402

OUT = pack.ROOT / "workflows"
HUB = "https://huggingface.co"
COLUMN, WIDTH = 380, 320  # pixels between columns, width of a node


@dataclass(frozen=True)
class Node:
    """One node: its type, place (column, pixels from the top), height, values, and links as "name.output"."""

    type: str
    column: int
    top: int
    height: int = 120
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    models: tuple[tuple[str, str, str], ...] = ()  # file name, URL, folder: what the UI offers to download


def link(name: str, output: int = 0) -> tuple[str, int]:
    """The output of another node."""
    return (name, output)


def _sampler(top: int = 0, **values: Any) -> Node:
    settings = dict(seed=0, steps=20, cfg=1.0, guidance=3.5, sampler="euler", scheduler="simple", denoise=1.0)
    return Node("SVDQuantSample", 3, top, 480, {"model": link("model"), **settings, **values})


def demo() -> dict[str, Node]:
    """The tiny model that ships with the pack: runs anywhere, in a second."""
    prompt = "a big yellow star at the center on a navy background"
    return {
        "model": Node(
            "SVDQuantLoadModel",
            0,
            0,
            110,
            {"model_name": "svdquant-demo-int4.safetensors"},
            "4-bit demo model",
        ),
        "lora": Node(
            "SVDQuantApplyLora",
            1,
            0,
            200,
            {
                "model": link("model"),
                "lora_name": "svdquant-demo-lora.safetensors",
                "strength": 0.0,
                "more": "0",
            },
            "Raise the strength to 1 to see the LoRA",
        ),
        "prompt": Node("SVDQuantDemoPrompt", 1, 280, 160, {"text": prompt}, "Prompt"),
        "empty": Node("SVDQuantDemoPrompt", 1, 520, 160, {"text": ""}, "Negative (empty)"),
        "latent": Node(
            "EmptySD3LatentImage", 1, 760, 140, {"width": 64, "height": 64, "batch_size": 1}, "64 x 64 pixels"
        ),
        "sample": Node(
            "SVDQuantSample",
            2,
            0,
            480,
            {
                **_sampler(seed=7, cfg=2.0).inputs,
                "model": link("lora"),
                "positive": link("prompt"),
                "negative": link("empty"),
                "latent": link("latent"),
            },
        ),
        "vae": Node("SVDQuantDemoVAE", 2, 560, 60),
        "decode": Node("VAEDecode", 3, 0, 80, {"samples": link("sample"), "vae": link("vae")}),
        "enlarge": Node(
            "ImageScaleBy",
            3,
            160,
            110,
            {"image": link("decode"), "upscale_method": "nearest-exact", "scale_by": 8.0},
        ),
        "save": Node(
            "SaveImage", 3, 350, 420, {"images": link("enlarge"), "filename_prefix": "svdquant-demo"}
        ),
    }


def flux_dev() -> dict[str, Node]:
    """FLUX.1-dev text to image with the published int4 checkpoint."""
    model = "svdq-int4_r32-flux.1-dev.safetensors"
    encoders = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
    return {
        "model": Node(
            "SVDQuantLoadModel",
            0,
            0,
            110,
            {"model_name": model},
            "fp4 instead of int4 on RTX 50",
            ((model, f"{HUB}/nunchaku-tech/nunchaku-flux.1-dev/resolve/main/{model}", "diffusion_models"),),
        ),
        "clip": Node(
            "DualCLIPLoader",
            0,
            200,
            180,
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "t5xxl_fp8_e4m3fn.safetensors",
                "type": "flux",
                "device": "default",
            },
            models=tuple(
                (name, f"{encoders}/{name}", "text_encoders")
                for name in ("clip_l.safetensors", "t5xxl_fp8_e4m3fn.safetensors")
            ),
        ),
        "vae": Node(
            "VAELoader",
            0,
            470,
            80,
            {"vae_name": "ae.safetensors"},
            models=(
                (
                    "ae.safetensors",
                    f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
                    "vae",
                ),
            ),
        ),
        "prompt": Node(
            "CLIPTextEncode",
            1,
            200,
            200,
            {"clip": link("clip"), "text": "a lighthouse on a cliff at dawn, long exposure, film grain"},
            "Prompt",
        ),
        "latent": Node(
            "EmptySD3LatentImage", 1, 480, 140, {"width": 1024, "height": 1024, "batch_size": 1}, "Image size"
        ),
        "sample": Node(
            "SVDQuantSample",
            2,
            0,
            480,
            {**_sampler(seed=42, steps=28).inputs, "positive": link("prompt"), "latent": link("latent")},
        ),
        "decode": Node("VAEDecode", 3, 0, 80, {"samples": link("sample"), "vae": link("vae")}),
        "save": Node(
            "SaveImage", 3, 160, 420, {"images": link("decode"), "filename_prefix": "svdquant-flux"}
        ),
    }


def flux_dev_lora() -> dict[str, Node]:
    """FLUX.1-dev with a LoRA in the low-rank branch."""
    name = "realism_lora_comfy_converted.safetensors"
    nodes = flux_dev()
    nodes["lora"] = Node(
        "SVDQuantApplyLora",
        1,
        -80,
        200,
        {"model": link("model"), "lora_name": name, "strength": 0.8, "more": "0"},
        models=((name, f"{HUB}/XLabs-AI/flux-lora-collection/resolve/main/{name}", "loras"),),
    )
    nodes["sample"].inputs["model"] = link("lora")
    return nodes


GRAPHS = {"demo": demo, "flux1-dev": flux_dev, "flux1-dev-lora": flux_dev_lora}


def api_form(nodes: dict[str, Node]) -> dict[str, Any]:
    """What POST /prompt takes."""
    number = {name: str(i + 1) for i, name in enumerate(nodes)}
    return {
        number[name]: {
            "class_type": node.type,
            "inputs": {
                key: [number[value[0]], value[1]] if isinstance(value, tuple) else value
                for key, value in node.inputs.items()
            },
            "_meta": {"title": node.title or node.type},
        }
        for name, node in nodes.items()
    }


def ui_form(nodes: dict[str, Node], info: dict[str, Any]) -> dict[str, Any]:
    """What the web UI opens: nodes with places, sockets and widget values by position; links by number."""
    number = {name: i + 1 for i, name in enumerate(nodes)}
    drawn = {name: _draw(number[name], order, node, info) for order, (name, node) in enumerate(nodes.items())}
    links = []
    for name, node in nodes.items():
        for slot, socket in enumerate(drawn[name]["inputs"]):
            source = node.inputs.get(socket["name"])
            if not isinstance(source, tuple):
                continue
            output = drawn[source[0]]["outputs"][source[1]]
            links.append([len(links) + 1, number[source[0]], source[1], number[name], slot, output["type"]])
            socket["link"] = len(links)
            output["links"].append(len(links))
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(drawn.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _draw(number: int, order: int, node: Node, info: dict[str, Any]) -> dict[str, Any]:
    signature = info[node.type]
    fields = {**signature["input"].get("required", {}), **signature["input"].get("optional", {})}
    sockets = [(key, spec) for key, spec in fields.items() if not _is_widget(spec)]
    properties: dict[str, Any] = {"Node name for S&R": node.type}
    if node.models:
        properties["models"] = [dict(name=n, url=u, directory=d) for n, u, d in node.models]
    return {
        "id": number,
        "type": node.type,
        "pos": [40 + node.column * COLUMN, 120 + node.top],
        "size": [WIDTH, node.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [{"name": key, "type": spec[0], "link": None} for key, spec in sockets],
        "outputs": [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(signature["output_name"], signature["output"], strict=True)
        ],
        "title": node.title or signature["display_name"],
        "properties": properties,
        "widgets_values": _widget_values(node, fields),
    }


def _is_widget(spec: list[Any]) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if options.get("forceInput"):
        return False
    return (
        isinstance(kind, list)
        or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        or "DYNAMICCOMBO" in kind
    )


def _widget_values(node: Node, fields: dict[str, Any]) -> list[Any]:
    values = []
    for key, spec in fields.items():
        if not _is_widget(spec):
            continue
        values.append(node.inputs[key])
        if len(spec) > 1 and spec[1].get("control_after_generate"):
            values.append("fixed")
    return values


def write(path: Path, graph: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(graph, indent=2) + "\n")
    print(path.relative_to(pack.ROOT))


def main() -> None:
    """Start a host, ask it for the nodes' signatures, write the files."""
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else places.tree_dir(places.NEWEST)
    host = places.host_at(tree, Path(sys.executable))
    with tempfile.TemporaryDirectory() as base, ComfyServer(host, Path(base)) as server:
        info = server.client.get("/object_info")
    for name, make in GRAPHS.items():
        nodes = make()
        write(OUT / "api" / f"{name}.json", api_form(nodes))
        write(OUT / f"{name}.json", ui_form(nodes, info))


if __name__ == "__main__":
    main()
