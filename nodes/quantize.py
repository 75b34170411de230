"""The node that makes a 4-bit checkpoint of a 16-bit one."""

from __future__ import annotations

import time
from pathlib import Path

from comfy_api.latest import io, ui

from ..loaders.source import open_source
from ..svdquant.adapters import folders, plans
from ..svdquant.adapters import quantize as host
from ..svdquant.quantizer import recipes, report, stream
from ..svdquant.quantizer import statistics as kept
from .calibrate import StatisticsType


class SVDQuantQuantize(io.ComfyNode):
    """File in, smaller file out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantQuantize",
            display_name="SVDQuant Quantize",
            category="SVDQuant/quantize",
            search_aliases=["quantize", "make int4", "make nvfp4", "deepcompressor", "svdq"],
            description=(
                "Quantize a 16-bit diffusion model to 4 bits and write it to models/diffusion_models. FLUX.1 becomes "
                "a file that any Nunchaku-compatible loader reads."
            ),
            inputs=[
                io.Combo.Input(
                    "source", options=folders.names(folders.MODELS), tooltip="The 16-bit model, also fp8."
                ),
                io.String.Input("file_name", default="my-model-int4", tooltip="In models/diffusion_models."),
                io.Combo.Input(
                    "precision",
                    options=["int4", "nvfp4"],
                    default="int4",
                    tooltip="nvfp4 is for RTX 50 cards.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=0,
                    max=256,
                    step=16,
                    tooltip="Of the 16-bit branch beside the 4-bit weight: more is nearer to the original and larger.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=["auto", *recipes.RECIPES],
                    default="auto",
                    tooltip="auto: best with statistics, instant without. svdquant is the paper's own.",
                ),
                io.Boolean.Input(
                    "center",
                    default=False,
                    tooltip="Let biases take the mean out of inputs: a smaller error, but LoRAs see other inputs.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip="Same seed, same file."),
                StatisticsType.Input("statistics", optional=True, tooltip="From SVDQuant Calibrate."),
                io.Latent.Input(
                    "after", optional=True, tooltip="What the watched model sampled: wait for it."
                ),
                io.Boolean.Input(
                    "save_statistics",
                    default=False,
                    optional=True,
                    tooltip="Keep them in a file beside the model.",
                ),
            ],
            outputs=[
                io.String.Output("path", display_name="path", tooltip="The file that was written."),
                io.String.Output(
                    "report", display_name="report", tooltip="Size, time and the error of every linear."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, source, file_name, precision, rank, recipe, center, seed, statistics=None, **more
    ) -> io.NodeOutput:
        began, target = time.perf_counter(), host.target(file_name)
        plan = plans.make_plan(
            open_source(folders.find(folders.MODELS, source)), precision=precision, rank=rank, centred=center
        )
        samples = read_once(statistics, plan)
        if more.get("save_statistics") and samples:
            kept.save(target.with_name(f"{target.stem}.statistics.safetensors"), samples)
        chosen = ("best" if samples else "instant") if recipe == "auto" else recipe
        errors = write(plan, target, stream.Settings(chosen, seed, host.device()), samples)
        text = report.as_text(target, errors, time.perf_counter() - began, measured=bool(samples))
        return io.NodeOutput(str(target), text, ui=ui.PreviewText(text))


def read_once(statistics: kept.Statistics | None, plan: plans.Plan) -> dict[str, kept.Sample] | None:
    """The samples the plan needs; None without statistics.

    Raises ValueError when the watched model has not been sampled.
    """
    if statistics is None:
        return None
    if not len(statistics):
        raise ValueError(
            "statistics: expected what a sampled model read, got nothing. Sample the model that SVDQuant Calibrate "
            "gives out, and connect that latent to `after`."
        )
    wanted = dict.fromkeys(job.source for job in plan.jobs)
    return {name: statistics[name] for name in wanted if name in statistics}


def write(
    plan: plans.Plan, target: Path, settings: stream.Settings, samples: dict | None
) -> dict[str, float]:
    """Quantize a plan under the host's progress bar; returns the error of each linear."""
    return stream.quantize(
        plan.source,
        plan.jobs,
        target,
        settings,
        statistics=samples,
        plain=plan.plain,
        metadata=plan.metadata,
        dialect=plan.dialect,
        progress=host.progress(),
    )
