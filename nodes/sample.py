"""The node that samples in one step: guidance, sampler and a report of time and memory."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..svdquant.adapters import sampling
from .reported import reported

# KSampler's settings in its order but for denoise, and guidance; SVDQuant Compare has the same.
SETTINGS: list[io.Input] = [
    io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**64 - 1,
        control_after_generate=True,
        tooltip="Same seed, same image.",
    ),
    io.Int.Input(
        "steps",
        default=20,
        min=1,
        max=10000,
        tooltip="Denoising steps; schnell and turbo models want 4 to 8.",
    ),
    io.Float.Input(
        "cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="Classifier-free guidance; 1 for distilled models such as FLUX.1, more needs a negative.",
    ),
    io.Float.Input(
        "guidance",
        default=3.5,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="Distilled guidance of FLUX.1-dev; others ignore it.",
    ),
    io.Combo.Input(
        "sampler",
        options=comfy.samplers.KSampler.SAMPLERS,
        default="euler",
        tooltip="The solver.",
    ),
    io.Combo.Input(
        "scheduler",
        options=comfy.samplers.KSampler.SCHEDULERS,
        default="simple",
        tooltip="How noise levels are spaced.",
    ),
]


class SVDQuantSample(io.ComfyNode):
    """What KSampler and FluxGuidance do together, with a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantSample",
            display_name="SVDQuant Sample",
            category="SVDQuant",
            search_aliases=["ksampler", "flux sampler", "nunchaku sampler", "denoise"],
            description="Sample a model, as KSampler does, with FLUX guidance built in, and report time and memory.",
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL, 4-bit or not."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent for text to image, an encoded image for image to image.",
                ),
                *SETTINGS,
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from noise; less keeps part of the latent.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to steer away from; needed when cfg is not 1."
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The denoised latent, for VAE Decode."),
                io.String.Output(
                    "report", display_name="report", tooltip="Steps, seconds a step, peak memory."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, latent, negative=None, **settings) -> io.NodeOutput:
        samples, report = sampling.sample(model, positive, negative, latent, sampling.Settings(**settings))
        return reported(samples, report, text=report)
