"""A FLUX.1 transformer of any size in plain torch, used to train and calibrate the demo model.

Parameter names are those of the original FLUX.1 release, so any loader of real checkpoints reads what is
saved here; the demo only shrinks the numbers (`FluxConfig`). ComfyUI's own class computes the same function
from the same weights, which a test holds. A drawing is a latent of 16x8x8 and makes 4x4 tokens of 64 numbers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cos and sin, [tokens, head_dim / 2]


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer; the defaults are the demo's."""

    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 256
    mlp_ratio: float = 4.0
    num_heads: int = 2
    depth: int = 1
    depth_single_blocks: int = 2
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10000
    qkv_bias: bool = True
    guidance_embed: bool = False

    def to_json(self) -> dict[str, object]:
        """The fields as JSON takes them."""
        return {**asdict(self), "axes_dim": list(self.axes_dim)}


def timestep_features(t: Tensor, width: int = 256) -> Tensor:
    """Cosines and sines of the time [B] in 0..1, as [B, width]."""
    half = width // 2
    frequency = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = t.float()[:, None] * 1000.0 * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotation(text_tokens: int, rows: int, columns: int, config: FluxConfig) -> Rotation:
    """Rotary angles of the sequence [text, image]; text sits at the origin, images at (0, row, column)."""
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    position = torch.cat([torch.zeros(text_tokens, 3), grid]).double()
    angles = []
    for axis, width in enumerate(config.axes_dim):
        frequency = config.theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(position[:, axis, None] * frequency)
    angle = torch.cat(angles, dim=-1).float()
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn each neighbouring pair of channels of x [B, heads, tokens, head_dim] by its angle."""
    cos, sin = turn
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def layer_norm(x: Tensor) -> Tensor:
    """Layer normalisation without learned parameters: the modulation supplies them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The normalised x, scaled and shifted by the conditioning vector."""
    return layer_norm(x) * (1 + scale) + shift


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, 1e-6)


class QKNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)


class Embedder(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.in_layer = nn.Linear(width_in, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Conditioning vector -> `parts` chunks [B, 1, hidden]: shift, scale, gate (twice in a double block)."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(width, parts * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.parts, dim=-1)


def attention_heads(qkv: Tensor, heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [B, tokens, 3 * hidden] into q, k, v [B, heads, tokens, head_dim], q and k normalised."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, turn: Rotation) -> Tensor:
    """Attention over all tokens, heads joined again: [B, tokens, hidden]."""
    out = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.norm = QKNorm(width // config.num_heads)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention_heads(self.qkv(x), self.heads, self.norm)


def feed_forward(width: int, inner: int) -> nn.Sequential:
    """The two-layer MLP of a double block."""
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))


class DoubleBlock(nn.Module):
    """Image and text keep their own weights and meet in one attention."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = SelfAttention(config), SelfAttention(config)
        self.img_mlp, self.txt_mlp = feed_forward(width, inner), feed_forward(width, inner)

    def forward(self, img: Tensor, txt: Tensor, vector: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vector), self.txt_mod(vector)
        img_qkv = self.img_attn.split(modulate(img, *img_mod[:2]))
        txt_qkv = self.txt_attn.split(modulate(txt, *txt_mod[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        txt_out, img_out = attend(q, k, v, turn).split([txt.shape[1], img.shape[1]], dim=1)
        img = img + img_mod[2] * self.img_attn.proj(img_out)
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        img = img + img_mod[5] * self.img_mlp(modulate(img, *img_mod[3:5]))
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, *txt_mod[3:5]))
        return img, txt


class SingleBlock(nn.Module):
    """One stream; attention and MLP run side by side from one wide linear into another."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.heads, self.widths = config.num_heads, (3 * width, inner)
        self.linear1 = nn.Linear(width, 3 * width + inner)
        self.linear2 = nn.Linear(width + inner, width)
        self.norm = QKNorm(width // config.num_heads)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, vector: Tensor, turn: Rotation) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        qkv, inner = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        mixed = attend(*attention_heads(qkv, self.heads, self.norm), turn)
        return x + gate * self.linear2(torch.cat([mixed, F.gelu(inner, approximate="tanh")], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, width: int, width_out: int):
        super().__init__()
        self.linear = nn.Linear(width, width_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)))


class Flux(nn.Module):
    """Predicts the velocity (noise - image) of a latent at time t in 0..1.

    x        [B, 16, H, W]   fp32   latent, H and W even
    t        [B]             fp32   1 is pure noise
    context  [B, T, 4096]    fp32   one vector per word
    pooled   [B, 768]        fp32   the prompt as one vector
    returns  [B, 16, H, W]   fp32
    """

    def __init__(self, config: FluxConfig = FluxConfig()):
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size**2
        self.img_in = nn.Linear(config.in_channels * patch, width)
        self.time_in = Embedder(256, width)
        self.vector_in = Embedder(config.vec_in_dim, width)
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(width, config.out_channels * patch)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        img = self.img_in(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        txt = self.txt_in(context)
        vector = self.time_in(timestep_features(t)) + self.vector_in(pooled)
        turn = rotation(txt.shape[1], rows, columns, self.config)
        for block in self.double_blocks:
            img, txt = block(img, txt, vector, turn)
        joined = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            joined = block(joined, vector, turn)
        out = self.final_layer(joined[:, txt.shape[1] :], vector)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def load(path: Path | str) -> Flux:
    """The demo-sized model with the weights of a 16-bit file, widened to fp32, frozen."""
    model = Flux()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(str(path)).items()})
    return model.eval().requires_grad_(False)
