"""The demo's world: six shapes in eight colours on four backgrounds, 64x64, each with a caption.

Everything is drawn from signed distances, in units of the image side: x to the right, y down, origin in the
middle. 1920 captions in all; the drawing of one caption varies a little in place and size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE = 64
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 90, 235),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 200),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
BACKGROUNDS = {
    "gray": (128, 128, 128),
    "navy": (20, 25, 80),
    "cream": (250, 240, 205),
    "teal": (20, 110, 110),
}
PLACES = {
    "left": (-0.18, 0.0),
    "right": (0.18, 0.0),
    "top": (0.0, -0.18),
    "bottom": (0.0, 0.18),
    "center": (0.0, 0.0),
}
SIZES = {"small": 0.20, "big": 0.32}


def circle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(x, y) - r


def square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r


def triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    slanted = np.abs(x) * math.sqrt(3) / 2 - y * 0.5 - 0.5 * r
    return np.maximum(slanted, y - 0.5 * r)


def ring(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r


def cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    lying = np.maximum(x - r, y - 0.33 * r)
    standing = np.maximum(x - 0.33 * r, y - r)
    return np.minimum(lying, standing)


def star(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Five points; `inward` is 0 between two points and 1 at the tip of one."""
    fifth = math.pi / 5
    inward = np.abs((np.arctan2(x, -y) + fifth) % (2 * fifth) - fifth) / fifth
    edge = 1.1 * r / ((1 - inward) + 2.4 * inward)
    return (np.hypot(x, y) - edge) * 0.6


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "ring": ring,
    "cross": cross,
    "star": star,
}


@dataclass(frozen=True)
class Scene:
    """What one caption says."""

    shape: str
    color: str
    background: str
    place: str
    size: str

    @property
    def caption(self) -> str:
        return (
            f"a {self.size} {self.color} {self.shape} at the {self.place} on a {self.background} background"
        )


ALL_SCENES = [Scene(*words) for words in itertools.product(SHAPES, COLORS, BACKGROUNDS, PLACES, SIZES)]


@dataclass(frozen=True)
class Jitter:
    """How far one drawing strays from its caption: offset of the centre and factor on the radius."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0

    @classmethod
    def random(cls, rng: np.random.Generator) -> Jitter:
        return cls(rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), rng.uniform(0.92, 1.08))


def distance(scene: Scene, jitter: Jitter = Jitter()) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance in pixels to the shape's edge (negative inside) and y of the row, both [64, 64]."""
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    x, y = np.meshgrid(axis, axis)
    x0, y0 = PLACES[scene.place]
    x0, y0, r = x0 + jitter.dx, y0 + jitter.dy, SIZES[scene.size] * jitter.scale
    return SHAPES[scene.shape](x - x0, y - y0, r) * SIDE, y


def draw(scene: Scene, jitter: Jitter = Jitter()) -> np.ndarray:
    """The picture [64, 64, 3] in -1..1: a flat shape with soft edges on a slight vertical gradient."""
    edge, y = distance(scene, jitter)
    inside = np.clip(0.5 - edge, 0, 1)[..., None]
    back = np.clip(np.array(BACKGROUNDS[scene.background], float) * (1 + 0.25 * y[..., None]), 0, 255)
    image = (1 - inside) * back + inside * np.array(COLORS[scene.color], float)
    return image.astype(np.float32) / 127.5 - 1


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Pictures [H, W, 3] as one batch [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def dataset(count: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """`count` random drawings [count, 3, 64, 64] and what each shows."""
    rng = np.random.default_rng(seed)
    images, scenes = [], []
    for _ in range(count):
        scene = ALL_SCENES[rng.integers(len(ALL_SCENES))]
        images.append(draw(scene, Jitter.random(rng)))
        scenes.append(scene)
    return to_tensor(images), scenes


def save_sheet(rows: list[Tensor], path: Path | str, *, zoom: int = 3) -> None:
    """Write a contact sheet: each row a batch [B, 3, H, W] in -1..1, enlarged without smoothing."""
    from PIL import Image

    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = ((sheet + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
