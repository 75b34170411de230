"""The node that makes a 4-bit checkpoint of a 16-bit one."""

from __future__ import annotations

import time
from pathlib import Path

from comfy_api.latest import io

from ..loaders.plan import Plan
from ..loaders.source import open_source
from ..svdquant.adapters import folders
from ..svdquant.adapters.quantizing import plans
from ..svdquant.adapters.quantizing import quantize as host
from ..svdquant.quantizer import choices, recipes, report, stream
from ..svdquant.quantizer import statistics as kept
from ..svdquant.quantizer.sensitivity import Limit
from .calibrate import StatisticsType
from .checked import checked
from .reported import reported

# What each linear's form is chosen to keep, instead of one rank for all.
LIMITS: list[io.Input] = [
    io.Int.Input(
        "budget_mb",
        default=0,
        min=0,
        max=2**20,
        optional=True,
        tooltip="File size: each linear gets the rank or the 16 bits that pay most. 0: the rank above.",
    ),
    io.Float.Input(
        "error_percent",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        optional=True,
        tooltip="Output error of all linears together: the smallest file within it. 0: the rank above.",
    ),
]


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
                io.Latent.Input("after", optional=True, tooltip="What that model sampled: wait for it."),
                *LIMITS,
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
    def validate_inputs(cls, source: str | None = None) -> bool | str:
        return checked(folders.MODELS, source, check=open_source)

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
        settings = stream.Settings(chosen, seed, host.device())
        limit = limit_of(more.get("budget_mb", 0), more.get("error_percent", 0.0))
        decision, errors = write(plan, limit, target, settings, samples)
        seconds = time.perf_counter() - began
        text = report.as_text(target, errors, seconds, measured=bool(samples))
        text = "\n".join((*plan.source.notes, text, decision.as_text() if decision else "")).strip()
        return reported(str(target), text, text=text, event=f"wrote {target} in {seconds:.1f} s")


def limit_of(budget_mb: int, error_percent: float) -> Limit | None:
    """What the two inputs ask for; 0 is nothing. ValueError for both."""
    if budget_mb and error_percent:
        raise ValueError("budget_mb, error_percent: expected one of them, got both. Set one to 0.")
    if budget_mb:
        return Limit(nbytes=budget_mb * 2**20)
    return Limit(error=error_percent / 100) if error_percent else None


def read_once(statistics: kept.Statistics | None, plan: Plan) -> dict[str, kept.Sample] | None:
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
    wanted = dict.fromkeys(job.reads for job in plan.jobs)
    return {name: statistics[name] for name in wanted if name in statistics}


def write(
    plan: Plan, limit: Limit | None, target: Path, settings: stream.Settings, samples: dict | None
) -> tuple[choices.Decision | None, dict[str, float]]:
    """Choose forms where there is a limit, and quantize, under the host's progress bar; returns also the errors."""
    if limit is None:
        errors = stream.quantize(plan, target, settings, statistics=samples, progress=host.progress())
        return None, errors
    formats = {job.precision for job in plan.jobs} | {"plain"}
    decision = choices.decide(
        plan, limit, sorted(formats - {"awq"}), target, settings, statistics=samples, progress=host.progress()
    )
    errors = stream.quantize(decision.plan, target, settings, statistics=samples, progress=host.progress())
    choices.save(decision, target, errors)
    return decision, errors
