"""Write every file of workflows/: one description, two forms.

    python tools/make_workflows.py            # with the Python of .venv; starts the ComfyUI of .hosts

`workflows/api/NAME.json` is what the headless API takes; `workflows/NAME.json` is the graph the web UI opens. The UI
form stores widget values by position, so the order of a node's inputs is asked of a running host.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pack

pack.alias()
from svdquant_nodes.tools.host import places
from svdquant_nodes.tools.host.server import ComfyServer

OUT = pack.ROOT / "workflows"
HUB = "https://huggingface.co"
COLUMN, WIDTH = 380, 320  # pixels between columns, width of a node


@dataclass(frozen=True)
class Link:
    """The output of another node, by the name it has in its graph."""

    name: str
    output: int = 0


@dataclass(frozen=True)
class Node:
    """One node: its type, place (column, pixels from the top, height), values and links, title, files it needs."""

    type: str
    place: tuple[int, int, int]
    inputs: dict[str, Any]
    title: str = ""
    downloads: tuple[tuple[str, str], ...] = ()  # (URL, folder): what the UI offers to download


Graph = dict[str, Node]


def node(kind: str, place: tuple[int, int, int], /, title: str = "", downloads=(), **inputs: Any) -> Node:
    """A node with its inputs as keywords."""
    return Node(kind, place, inputs, title, tuple(downloads))


def _settings(**changes: Any) -> dict[str, Any]:
    return (
        dict(seed=0, steps=20, cfg=1.0, guidance=3.5, sampler="euler", scheduler="simple", denoise=1.0)
        | changes
    )


def demo() -> Graph:
    """The tiny model that ships with the pack: runs anywhere, in a second."""
    star = "a big yellow star at the center on a navy background"
    return {
        "model": node("SVDQuantLoadModel", (0, 0, 110), model_name="svdquant-demo-int4.safetensors"),
        "lora": node(
            "SVDQuantApplyLora",
            (1, 0, 200),
            "Raise the strength to 1 to see the LoRA",
            model=Link("model"),
            lora_name="svdquant-demo-lora.safetensors",
            strength=0.0,
            more="0",
        ),
        "prompt": node("SVDQuantDemoPrompt", (1, 280, 160), "Prompt", text=star),
        "empty": node("SVDQuantDemoPrompt", (1, 520, 160), "Negative (empty)", text=""),
        "latent": node("EmptySD3LatentImage", (1, 760, 140), "64 x 64", width=64, height=64, batch_size=1),
        "sample": node(
            "SVDQuantSample",
            (2, 0, 480),
            model=Link("lora"),
            positive=Link("prompt"),
            negative=Link("empty"),
            latent=Link("latent"),
            **_settings(seed=7, cfg=2.0),
        ),
        "vae": node("SVDQuantDemoVAE", (2, 560, 60)),
        "decode": node("VAEDecode", (3, 0, 80), samples=Link("sample"), vae=Link("vae")),
        "enlarge": node(
            "ImageScaleBy", (3, 160, 110), image=Link("decode"), upscale_method="nearest-exact", scale_by=8.0
        ),
        "save": node("SaveImage", (3, 350, 420), images=Link("enlarge"), filename_prefix="svdquant-demo"),
    }


FLUX = f"{HUB}/nunchaku-tech/nunchaku-flux.1-dev/resolve/main/svdq-int4_r32-flux.1-dev.safetensors"
CLIP_L = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"
T5 = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn.safetensors"
AE = f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"
LORA = f"{HUB}/XLabs-AI/flux-lora-collection/resolve/main/realism_lora_comfy_converted.safetensors"


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _flux_files() -> Graph:
    """The loaders of FLUX.1-dev, each with what the UI offers to download."""
    return {
        "model": node(
            "SVDQuantLoadModel",
            (0, 0, 110),
            "4-bit model (fp4 on RTX 50)",
            [(FLUX, "diffusion_models")],
            model_name=_name(FLUX),
        ),
        "clip": node(
            "DualCLIPLoader",
            (0, 200, 180),
            downloads=[(CLIP_L, "text_encoders"), (T5, "text_encoders")],
            clip_name1=_name(CLIP_L),
            clip_name2=_name(T5),
            type="flux",
            device="default",
        ),
        "vae": node("VAELoader", (0, 470, 80), downloads=[(AE, "vae")], vae_name=_name(AE)),
    }


def flux_dev() -> Graph:
    """FLUX.1-dev text to image with the published int4 checkpoint."""
    text = "a lighthouse on a cliff at dawn, long exposure, film grain"
    return _flux_files() | {
        "prompt": node("CLIPTextEncode", (1, 200, 200), "Prompt", clip=Link("clip"), text=text),
        "latent": node("EmptySD3LatentImage", (1, 480, 140), "Size", width=1024, height=1024, batch_size=1),
        "sample": node(
            "SVDQuantSample",
            (2, 0, 480),
            model=Link("model"),
            positive=Link("prompt"),
            latent=Link("latent"),
            **_settings(seed=42, steps=28),
        ),
        "decode": node("VAEDecode", (3, 0, 80), samples=Link("sample"), vae=Link("vae")),
        "save": node("SaveImage", (3, 160, 420), images=Link("decode"), filename_prefix="svdquant-flux"),
    }


def flux_dev_lora() -> Graph:
    """FLUX.1-dev with a LoRA in the low-rank branch."""
    nodes = flux_dev()
    nodes["lora"] = node(
        "SVDQuantApplyLora",
        (1, -80, 200),
        downloads=[(LORA, "loras")],
        model=Link("model"),
        lora_name=_name(LORA),
        strength=0.8,
        more="0",
    )
    nodes["sample"].inputs["model"] = Link("lora")
    return nodes


GRAPHS = {"demo": demo, "flux1-dev": flux_dev, "flux1-dev-lora": flux_dev_lora}


def api_form(nodes: Graph) -> dict[str, Any]:
    """What POST /prompt takes."""
    number = {name: str(i + 1) for i, name in enumerate(nodes)}
    return {
        number[name]: {
            "class_type": node.type,
            "inputs": {
                key: [number[value.name], value.output] if isinstance(value, Link) else value
                for key, value in node.inputs.items()
            },
            "_meta": {"title": node.title or node.type},
        }
        for name, node in nodes.items()
    }


def ui_form(nodes: Graph, info: dict[str, Any]) -> dict[str, Any]:
    """What the web UI opens: nodes with places, sockets and widget values by position; links by number."""
    number = {name: i + 1 for i, name in enumerate(nodes)}
    drawn = {name: _draw(number[name], order, node, info) for order, (name, node) in enumerate(nodes.items())}
    links = []
    for name, node in nodes.items():
        for slot, socket in enumerate(drawn[name]["inputs"]):
            source = node.inputs.get(socket["name"])
            if not isinstance(source, Link):
                continue
            output = drawn[source.name]["outputs"][source.output]
            links.append(
                [len(links) + 1, number[source.name], source.output, number[name], slot, output["type"]]
            )
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
    if node.downloads:
        properties["models"] = [dict(name=_name(url), url=url, directory=d) for url, d in node.downloads]
    column, top, height = node.place
    return {
        "id": number,
        "type": node.type,
        "pos": [40 + column * COLUMN, 120 + top],
        "size": [WIDTH, height],
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
