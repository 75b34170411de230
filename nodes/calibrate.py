"""The node that watches a model's linears while it samples, for SVDQuant Quantize."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..svdquant.adapters.quantizing import calibration
from ..svdquant.quantizer.statistics import Statistics

log = logging.getLogger("svdquant-nodes")
StatisticsType = io.Custom("SVDQ_STATISTICS")


class SVDQuantCalibrate(io.ComfyNode):
    """MODEL in, watched MODEL and what it will have seen out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantCalibrate",
            display_name="SVDQuant Calibrate",
            category="SVDQuant/quantize",
            search_aliases=["quantize", "calibration", "deepcompressor", "svdq make"],
            description=(
                "Record what every linear of a 16-bit model reads while you sample it with your own prompts; "
                "SVDQuant Quantize fits the 4-bit model to that."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model that will be quantized."),
                io.Int.Input(
                    "tokens",
                    default=2048,
                    min=64,
                    max=65536,
                    step=64,
                    tooltip="Rows kept of every linear's input, chosen evenly from all. FLUX.1 takes 4 MB of RAM each.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="Which rows are kept; same seed, same rows.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The same model, watched. Sample this one: 4 to 16 prompts are enough."
                ),
                StatisticsType.Output(
                    "statistics",
                    display_name="statistics",
                    tooltip="For SVDQuant Quantize; fills while you sample.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, tokens: int, seed: int) -> io.NodeOutput:
        statistics = Statistics(tokens, seed)
        watched = calibration.recording(model, statistics.see)
        log.info(
            "SVDQuant: calibration may grow to %.1f GB of RAM", calibration.memory(model, tokens) / 2**30
        )
        return io.NodeOutput(watched, statistics)
