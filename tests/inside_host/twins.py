"""The same model twice: our quantized layers with activations left exact, and the host's own fp32 layers.

With activations exact, a quantized layer computes W_eff @ x + bias. The twin is the host's own model class, with the
host's own Linear, on the dequantized weights. Whatever the host does to the twin (merge a LoRA, switch a hook,
offload half of it) must then give the same numbers on both, up to fp32 rounding. No quantization noise hides a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sample
import comfy.sd
import torch
from torch import Tensor

from svdquant_nodes.svdquant.adapters import layout
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.core import reference

DEMO = Path(__file__).resolve().parents[2] / "demo"
DEMO_INT4 = DEMO / "diffusion_models" / "svdquant-demo-int4.safetensors"
DEMO_BF16 = DEMO / "diffusion_models" / "svdquant-demo-bf16.safetensors"
DEMO_LORA = DEMO / "loras" / "svdquant-demo-lora.safetensors"


def _exact(x: Tensor, smooth: Tensor, down: Tensor, shift: float = 0.0):
    return (x.float() + shift) / smooth.float(), None, reference.hidden(x, down)


def _multiply(values: Tensor, scales: None, hidden: Tensor, weights, **to: Any) -> Tensor:
    residual = reference.residual(weights) * weights.smooth.float()
    y = values @ residual.T + hidden @ weights.up.float().T
    return reference.finished(y, weights.bias, **to)


EXACT_ACTIVATIONS = SimpleNamespace(
    quantize_int4=_exact,
    quantize_int4_unsigned=_exact,
    quantize_nvfp4=_exact,
    quantize_int8=_exact,
    gemm_int4=_multiply,
    gemm_nvfp4=_multiply,
    gemm_int8=_multiply,
    gemv_awq=reference.gemv_awq,
)


@dataclass(frozen=True)
class Twins:
    quantized: Any
    dense: Any


def make(path: Path = DEMO_INT4, activations: str = "auto") -> Twins:
    """Load a checkpoint with exact activations, and build its dense twin from what it holds."""
    quantized = load_model(path, ops=EXACT_ACTIVATIONS, activations=activations)
    tensors = {
        name: t.float() for name, t in quantized.model.diffusion_model.state_dict().items() if _plain(t)
    }
    for key, layer in quantized_linears(quantized.model):
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        parts = layout.unpack(layer.weight._qdata, layer.weight._params)
        weight, bias = layout.dense(parts, tuple(layer.weight.shape), layer.bias)
        tensors[f"{name}.weight"] = weight
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    return Twins(quantized, comfy.sd.load_diffusion_model_state_dict(tensors))


def _plain(tensor: Tensor) -> bool:
    return not isinstance(tensor, layout.QuantizedTensor)


def conditioning(seed: int = 3, **extra) -> list:
    """CONDITIONING of random tensors in the demo model's sizes."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 6, 4096, generator=generator) * 0.3
    return [[context, {"pooled_output": torch.randn(1, 768, generator=generator), **extra}]]


def sample(
    model, *, positive=None, negative=None, cfg: float = 1.0, steps: int = 3, batch: int = 1, seed: int = 0
):
    """The latent the host's own sampler makes, [batch, 16, 8, 8]."""
    positive = conditioning() if positive is None else positive
    latent = torch.zeros(batch, 16, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    against = positive if negative is None else negative
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, against, latent, seed=seed, disable_pbar=True
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual - expected).norm() / expected.norm())
