"""The demo model's two ends: words in, pixels out. Neither needs weights worth the name.

Words    every word has a fixed pseudo-random vector, seeded by a hash of its spelling. The demo model was
         trained on these vectors, so they must stay the same to the last bit.
Pixels   a linear VAE: 16 principal components of 8x8 pixel patches, scaled. Its file is 13 KB.

A drawing has 64x64 pixels, but any multiple of 16 runs. Nothing here touches ComfyUI: `DemoVAE` just answers
the calls that its VAE nodes make.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...loaders.tensorfile import open_file

log = logging.getLogger("svdquant-nodes")

TOKENS = 6
CONTEXT_WIDTH = 4096
POOLED_WIDTH = 768
SILENT = ("a", "at", "the", "on")
WORDS = {
    "size": ("small", "big"),
    "color": ("red", "green", "blue", "yellow", "purple", "orange", "white", "black"),
    "shape": ("circle", "square", "triangle", "ring", "cross", "star"),
    "place": ("left", "right", "top", "bottom", "center"),
    "background": ("gray", "navy", "cream", "teal"),
}
GRAMMAR = "a {size} {color} {shape} at the {place} on a {background} background"

PATCH = 8
FLUX_SHIFT, FLUX_SCALE = (
    0.1159,
    0.3611,
)  # model latent = (host latent - shift) * scale, the host's FLUX latent format
VAE_FILE = Path(__file__).resolve().parents[2] / "demo" / "vae" / "svdquant-demo-vae.safetensors"


def _vector(word: str, width: int, salt: str) -> Tensor:
    """The Gaussian vector of a word, [width] fp32, seeded by the first eight bytes of sha256("salt:word")."""
    import numpy as np  # the model was trained on this generator's numbers; torch's own differ

    digest = hashlib.sha256(f"{salt}:{word}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return torch.from_numpy(generator.standard_normal(width).astype(np.float32))


def spoken(prompt: str) -> list[str]:
    """The words of a prompt that carry meaning, in order, without punctuation and articles."""
    words = (word.strip(".,;:!?\"'") for word in prompt.lower().split())
    return [word for word in words if word and word not in SILENT]


def complaint(prompt: str) -> str | None:
    """What in the prompt the demo model cannot understand, as one sentence; None if all is well."""
    known = {word for words in WORDS.values() for word in words} | {"background"}
    words = spoken(prompt)
    unknown = [word for word in words if word not in known]
    if unknown:
        choices = "; ".join(f"{slot}: {', '.join(words)}" for slot, words in WORDS.items())
        return f"demo prompt: unknown word {', '.join(map(repr, unknown))}. Known words are {choices}."
    if len(words) > TOKENS:
        late = ", ".join(map(repr, words[TOKENS:]))
        return f"demo prompt: only the first {TOKENS} words count, not {late}. Write: {GRAMMAR}."
    return None


def encode_prompt(prompt: str) -> tuple[Tensor, Tensor]:
    """Turn a prompt into the two text inputs of the demo model.

    returns
      context  [1, 6, 4096]  fp32   0.3 * word + 0.1 * place in the sentence; `<pad>` fills the end
      pooled   [1, 768]      fp32   the sum of the words over sqrt(number of words); zeros without words

    The empty prompt is what guidance compares with: the model was trained on it too. An unknown word gets a
    vector as well, one the model has never seen, and a warning names it.
    """
    if problem := complaint(prompt):
        log.warning(problem)
    words = spoken(prompt)[:TOKENS]
    padded = words + ["<pad>"] * (TOKENS - len(words))
    context = [
        0.3 * _vector(word, CONTEXT_WIDTH, "ctx") + 0.1 * _vector(f"<{place}>", CONTEXT_WIDTH, "ctx")
        for place, word in enumerate(padded)
    ]
    pooled = torch.zeros(POOLED_WIDTH)
    for word in words:
        pooled = pooled + _vector(word, POOLED_WIDTH, "pool")
    return torch.stack(context)[None], (pooled / math.sqrt(max(len(words), 1)))[None]


@dataclass(frozen=True)
class DemoVAE:
    """A linear VAE that ComfyUI's VAE nodes take in place of their own object.

    mean   [192]      fp32   the average 8x8x3 patch, as pixel_unshuffle orders it, pixels in -1..1
    basis  [16, 192]  fp32   orthonormal patch components, strongest first
    scale  [16]       fp32   size of each component for a model latent of 1

    With p a patch: model latent = basis (p - mean) / scale; back: p = mean + basis^T (scale * model latent).
    ComfyUI hands over host latents: model latent = (host latent - 0.1159) * 0.3611, as for any FLUX model.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        for name, shape in (("mean", (192,)), ("basis", (16, 192)), ("scale", (16,))):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"demo VAE: expected {name} {list(shape)}, got {list(tensor.shape)}. Use {VAE_FILE.name}."
                )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DemoVAE:
        """Build it from the tensors of a file; ValueError names one that is missing."""
        for name in ("mean", "basis", "scale"):
            if name not in tensors:
                raise ValueError(
                    f"demo VAE: expected a tensor {name!r}, got {sorted(tensors)}. Use {VAE_FILE.name}."
                )
        return cls(*(tensors[name].to(torch.float32, copy=True) for name in ("mean", "basis", "scale")))

    def to_patches(self, latent: Tensor) -> Tensor:
        """Model latent [B, 16, h, w] -> pixels [B, 3, 8h, 8w] in -1..1, not clipped."""
        basis, scale, mean = (t.to(latent.device) for t in (self.basis, self.scale, self.mean))
        patches = (latent.float().movedim(1, -1) * scale) @ basis + mean
        return F.pixel_shuffle(patches.movedim(-1, 1), PATCH)

    def from_patches(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 8h, 8w] in -1..1 -> model latent [B, 16, h, w]."""
        basis, scale, mean = (t.to(pixels.device) for t in (self.basis, self.scale, self.mean))
        patches = F.pixel_unshuffle(pixels.float(), PATCH).movedim(1, -1)
        return ((patches - mean) @ basis.T / scale).movedim(-1, 1).contiguous()

    def decode(self, samples: Tensor, vae_options: Mapping[str, object] | None = None) -> Tensor:
        """Host latent [B, 16, h, w] -> image [B, 8h, 8w, 3] fp32 in 0..1."""
        if samples.ndim == 5:  # a latent of one video frame
            samples = samples[:, :, 0]
        if samples.ndim != 4 or samples.shape[1] != 16:
            raise ValueError(
                f"demo VAE: expected a FLUX latent [B, 16, h, w], got {list(samples.shape)}. "
                "Sample the demo model from an SD3 or FLUX empty latent."
            )
        pixels = self.to_patches((samples.float() - FLUX_SHIFT) * FLUX_SCALE)
        return ((pixels + 1) / 2).clamp(0, 1).movedim(1, -1)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Image [B, H, W, 3 or more] in 0..1 -> host latent [B, 16, H // 8, W // 8] fp32.

        Sides that 8 does not divide are cropped evenly, as the host does.
        """
        height, width = (side // PATCH * PATCH for side in pixel_samples.shape[1:3])
        top, left = (side % PATCH // 2 for side in pixel_samples.shape[1:3])
        crop = pixel_samples[:, top : top + height, left : left + width, :3].movedim(-1, 1)
        return self.from_patches(crop * 2 - 1) / FLUX_SCALE + FLUX_SHIFT

    def decode_tiled(self, samples: Tensor, **_: object) -> Tensor:
        """As `decode`: patches do not overlap, so tiles change nothing."""
        return self.decode(samples)

    def encode_tiled(self, pixel_samples: Tensor, **_: object) -> Tensor:
        """As `encode`."""
        return self.encode(pixel_samples)

    def spacial_compression_decode(self) -> int:
        """Pixels per latent cell; the host spells it so."""
        return PATCH

    spacial_compression_encode = spacial_compression_decode

    def temporal_compression_decode(self) -> None:
        """None: this VAE knows no frames."""


def load_vae(path: Path = VAE_FILE) -> DemoVAE:
    """The demo's VAE from its file; ValueError says what is wrong with the file."""
    return DemoVAE.from_tensors(open_file(path))
