"""A job of a plan becomes the task that recipes work on, or the weight-only linear that needs none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...loaders.source import Job, SourceModel
from ..core import awq
from ..core.tiles import interleave
from ..core.weights import AWQ, INT4, INT4_UNSIGNED, NVFP4, LinearWeights, QuantSpec
from .task import Sample, T, Task


def task_of(
    source: SourceModel, job: Job, statistics: Mapping[str, Sample] | None, *, seed: int, device: str
) -> Task:
    """Weight, bias and inputs of a W4A4 job, on a device. ValueError that names file and linear for a damaged one."""
    weight, bias = source.cut(job)
    bias = fold(bias, job, statistics)
    sample = None if statistics is None or job.reads not in statistics else statistics[job.reads]
    try:
        return Task(
            weight.to(device),
            None if bias is None else bias.to(device),
            spec_of(job),
            job.rank,
            None if sample is None else sample.columns(slice(*job.columns)).to(device),
            center_of(job, statistics, device),
            seed,
        )
    except ValueError as error:
        raise ValueError(f"{source.path.name}: {job.source}: {error}") from None


def spec_of(job: Job) -> QuantSpec:
    """Format and group of a W4A4 job."""
    if job.precision == "nvfp4":
        return NVFP4
    return INT4_UNSIGNED if job.after_gelu else INT4


def center_of(job: Job, statistics: Mapping[str, Sample] | None, device: str) -> Tensor | None:
    """The mean that other biases take out of the job's input, [K], or None."""
    if job.center is None or statistics is None:
        return None
    return statistics[job.center].columns(slice(*job.columns)).mean.float().to(device)


def fold(bias: Tensor | None, job: Job, statistics: Mapping[str, Sample] | None) -> Tensor | None:
    """The bias less the means it takes out for later linears."""
    if not job.folds or statistics is None or bias is None:
        return bias
    whole = torch.zeros(max(job.rows[0] + len(bias), *(f.rows[1] or 0 for f in job.folds)))
    for one in job.folds:
        whole[slice(*one.rows)] += statistics[one.input].mean[slice(*one.columns)].float()
    return bias - whole[job.rows[0] : job.rows[0] + len(bias)]


def weight_only(source: SourceModel, job: Job, statistics: Mapping[str, Sample] | None) -> LinearWeights:
    """A job in W4A16; a modulation's rows are interleaved and its scale rows get a 1 added (Nunchaku layout).

    Raises ValueError that names file and linear for a weight with NaN.
    """
    weight, bias = source.cut(job)
    bias = fold(bias, job, statistics)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{source.path.name}: {job.source}: weight: expected finite numbers, got NaN or infinity. "
            "The source file is damaged."
        )
    return round_weights(weight, bias, job.chunks)


def round_weights(weight: Tensor, bias: Tensor | None, chunks: int = 0) -> LinearWeights:
    """4-bit weights for 16-bit inputs: [N, K], [N] or None; chunks of a modulation, or 0."""
    if chunks and bias is not None:
        bias = bias.to(T).unflatten(0, (chunks, -1)).clone()
        bias[1::3] += 1
        bias = bias.flatten()
    if chunks:
        weight, bias = (None if t is None else interleave(t, chunks) for t in (weight, bias))
    codes, scales, zeros = awq.quantize_weight(weight, T)
    return LinearWeights(AWQ, codes, scales, zeros=zeros, bias=None if bias is None else bias.to(T))
