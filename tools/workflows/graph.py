"""What a workflow is made of: files to download, nodes with places, links between them, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from svdquant_nodes.loaders.published import PUBLISHED, parse

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class File:
    """A model file: where it is, ComfyUI's folder for it, its size in GB (10^9 bytes)."""

    url: str
    folder: str
    size: float

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def hub(path: str, folder: str, size: float) -> File:
    """owner/repo/path/file of the hub's main branch."""
    owner, repo, file = path.split("/", 2)
    return File(f"{HUB}/{owner}/{repo}/resolve/main/{file}", folder, size)


def published(name: str, size: float) -> File:
    """A 4-bit checkpoint by its name in `loaders/published.py`."""
    source = parse(name)
    return hub(f"{source.repo}/{source.file}", PUBLISHED[name].folder, size)


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
    files: tuple[File, ...] = ()


Graph = dict[str, Node]


@dataclass(frozen=True)
class Workflow:
    """A workflow's name, what it shows in a few words, three to five sentences for its note, and its graph.

    made     4-bit files (name, GB) that another workflow makes and this one loads
    picture  what it draws, for its picture in the list of templates: a file of the pack, and the part of it
    """

    name: str
    shows: str
    note: str
    graph: Callable[[], Graph]
    made: tuple[tuple[str, float], ...] = ()
    picture: tuple[str, tuple[int, int, int, int]] | None = None


def node(kind: str, place: tuple[int, int, int], /, title: str = "", files=(), **inputs: Any) -> Node:
    """A node with its inputs as keywords."""
    return Node(kind, place, inputs, title, tuple(files))


# The nodes that most workflows have, each in its usual place.


def load_model(file: File, title: str = "4-bit model (fp4 on RTX 50)") -> Node:
    return node("SVDQuantLoadModel", (0, 0, 130), title, [file], model_name=file.name, activations="auto")


def load_clip(file: File, kind: str) -> Node:
    values = dict(clip_name=file.name, type=kind, device="default")
    return node("CLIPLoader", (0, 210, 130), files=[file], **values)


def load_vae(file: File) -> Node:
    return node("VAELoader", (0, 470, 80), files=[file], vae_name=file.name)


def load_image(title: str) -> Node:
    return node("LoadImage", (0, 630, 320), title, image="example.png")


def prompt(text: str, top: int = 0, title: str = "Prompt") -> Node:
    return node("CLIPTextEncode", (1, top, 190), title, clip=Link("clip"), text=text)


def empty_latent(width: int, height: int, kind: str = "EmptySD3LatentImage", top: int = 480) -> Node:
    return node(kind, (1, top, 140), f"{width} x {height}", width=width, height=height, batch_size=1)


def sample(model: str, latent: str | Link = "latent", **settings: Any) -> Node:
    """SVDQuant Sample; `positive` and `negative` may be links, without them it takes `prompt` and no negative."""
    values = dict(seed=42, steps=20, cfg=1.0, guidance=3.5, sampler="euler", scheduler="simple", denoise=1.0)
    links = dict(model=Link(model), positive=Link("prompt"), latent=_link(latent))
    return node("SVDQuantSample", (2, 0, 480), **links, **values | settings)


def _link(to: str | Link) -> Link:
    return to if isinstance(to, Link) else Link(to)


def picture(prefix: str) -> Graph:
    """Decode and save."""
    return {
        "decode": node("VAEDecode", (3, 0, 80), samples=Link("sample"), vae=Link("vae")),
        "save": node("SaveImage", (3, 160, 420), images=Link("decode"), filename_prefix=f"svdquant-{prefix}"),
    }


def lora(file: File, strength: float = 1.0, place: tuple[int, int, int] = (1, -260, 200)) -> Node:
    values = dict(model=Link("model"), lora_name=file.name, strength=strength, more="0")
    return node("SVDQuantApplyLora", place, files=[file], **values)
