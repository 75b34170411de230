"""One call that samples a model as the host's KSampler does, and says how long a step took and what memory it used."""

from __future__ import annotations

import time
from dataclasses import dataclass

import comfy.model_management
import node_helpers
import nodes
import psutil
import torch
from comfy.patcher_extension import WrappersMP

KEY = "svdquant"


@dataclass
class Timing:
    """Filled while sampling: seconds spent in the sampler, and its number of steps."""

    seconds: float = 0.0
    steps: int = 0

    def __call__(self, executor, model_wrap, sigmas, *args, **kwargs):
        """Wraps the host's SAMPLER_SAMPLE: model loading is not counted."""
        start = time.perf_counter()
        try:
            return executor(model_wrap, sigmas, *args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start
            self.steps += max(len(sigmas) - 1, 0)


@dataclass(frozen=True)
class Settings:
    """What KSampler asks for, and `guidance`, a number for guidance-distilled models that others ignore."""

    seed: int
    steps: int
    cfg: float
    guidance: float
    sampler: str
    scheduler: str
    denoise: float


def sample(model, positive, negative, latent, settings: Settings):
    """Sample `latent`; previews, progress and interruption are the host's.

    negative   CONDITIONING or None, which only cfg 1 allows
    returns    (LATENT, report text)
    """
    cfg = settings.cfg
    if negative is None and cfg != 1.0:
        raise ValueError(
            f"SVDQuant Sample: cfg {cfg:g} needs a negative conditioning. Connect one or set cfg to 1."
        )
    timing, timed = Timing(), model.clone()
    timed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, timing)
    guided = node_helpers.conditioning_set_values(positive, {"guidance": settings.guidance})
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    (samples,) = nodes.common_ksampler(
        timed,
        settings.seed,
        settings.steps,
        cfg,
        settings.sampler,
        settings.scheduler,
        guided,
        guided if negative is None else negative,
        latent,
        denoise=settings.denoise,
    )
    return samples, report(timing, device)


def report(timing: Timing, device: torch.device) -> str:
    """One line: steps, seconds a step, peak memory."""
    per_step = timing.seconds / max(timing.steps, 1)
    return f"{timing.steps} steps, {per_step:.3f} s each, {timing.seconds:.2f} s in all; {_memory(device)}"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MB on {torch.cuda.get_device_name(device)}"
    return f"{psutil.Process().memory_info().rss / 2**20:.0f} MB of RAM in use, on {device.type}"
