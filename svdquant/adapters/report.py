"""What a checkpoint is, layer by layer, as text a user can read and as data a script can."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ...loaders.checkpoint import Checkpoint
from ..kernels import ops, select
from .families import Role, resolve


@dataclass(frozen=True)
class LayerReport:
    """One stored linear; sizes are the true ones where the family tells them."""

    name: str
    precision: str
    group: int
    out_features: int
    in_features: int
    rank: int
    act_shift: float
    nbytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint from its header alone; no tensor byte is read."""

    file: str
    dialect: str
    family: str | None
    layers: tuple[LayerReport, ...]
    plain_tensors: int
    plain_bytes: int
    warnings: tuple[str, ...]

    @property
    def quantized_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def as_dict(self) -> dict:
        return asdict(self) | {"quantized_bytes": self.quantized_bytes}


def describe(checkpoint: Checkpoint) -> CheckpointReport:
    """Describe a checkpoint and what its family says of each layer."""
    family = resolve(checkpoint)
    roles = family.roles(checkpoint) if family else {}
    return CheckpointReport(
        file=checkpoint.path.name,
        dialect=checkpoint.dialect,
        family=family.name if family else None,
        layers=tuple(_layer(name, info, roles.get(name, Role())) for name, info in checkpoint.info.items()),
        plain_tensors=len(checkpoint.plain_info),
        plain_bytes=sum(info.nbytes for info in checkpoint.plain_info.values()),
        warnings=checkpoint.warnings,
    )


def _layer(name: str, info, role: Role) -> LayerReport:
    shift = info.spec.act_shift or (role.act_shift if info.spec.format == "int4" else 0.0)
    return LayerReport(
        name=name,
        precision=info.spec.format,
        group=info.spec.group,
        out_features=role.out_features or info.out_features,
        in_features=role.in_features or info.in_features,
        rank=info.rank,
        act_shift=shift,
        nbytes=info.nbytes,
    )


_GEMM = {"int4": "gemm_int4", "nvfp4": "gemm_nvfp4", "awq": "gemv_awq"}


def computed_by(report: CheckpointReport, device: torch.device) -> str:
    """What computes the layers of each format on a device, and why nothing faster does: one line a format.

    Builds the device's kernels if they have not been needed before.
    """
    lines = []
    wide = ops.eight_bits_pay(device.type, device.index)
    for precision in sorted({layer.precision for layer in report.layers}):
        widened = wide and precision != "awq"
        request = select.Request("gemm_int8" if widened else _GEMM[precision], "bfloat16")
        choice = ops.choose(ops.wanted(request), device.type, device.index)
        lines.append(f"{precision} layers on {device}{', in 8 bit' * widened}: {choice.sentence()}")
    return "\n".join(lines)


def as_text(report: CheckpointReport) -> str:
    """A heading, one line a layer, totals, warnings."""
    lines = [f"{report.file}: {report.dialect}, {report.family or 'family unknown'}"]
    width = max((len(layer.name) for layer in report.layers), default=0)
    for layer in report.layers:
        shift = f"  shift {layer.act_shift:g}" if layer.act_shift else ""
        shape = f"{layer.out_features}x{layer.in_features}"
        lines.append(
            f"  {layer.name:<{width}}  {layer.precision} g{layer.group:<3} {shape:>12}  rank {layer.rank:<4}"
            f"{layer.nbytes / 2**20:8.2f} MB{shift}"
        )
    lines.append(
        f"{len(report.layers)} quantized layers, {report.quantized_bytes / 2**20:.1f} MB; "
        f"{report.plain_tensors} 16-bit tensors, {report.plain_bytes / 2**20:.1f} MB"
    )
    return "\n".join(lines + [f"warning: {warning}" for warning in report.warnings])
