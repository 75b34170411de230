"""A checkpoint file becomes a host model: open, find the family, assemble layers, build, attach. In that order."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...loaders.checkpoint import Checkpoint
from ...loaders.detect import open_checkpoint
from ..core.weights import LinearWeights
from ..kernels import ops as kernel_ops
from ..kernels.select import FUSED_OPS
from . import activations as widths
from . import feed_forward, layout, single_block
from .conventions import straighten
from .families import Family, Mapped, Role, apply_role, resolve
from .family import assemble, take_share
from .inputs import share_inputs
from .lora import branches
from .operations import make_operations, quantized_linears

log = logging.getLogger("svdquant-nodes")


def load_model(
    path: str | Path,
    ops: ModuleType = kernel_ops,
    activations: str = widths.AUTO,
    disable_dynamic: bool = False,
):
    """Load an SVDQuant checkpoint as an ordinary host MODEL (a ModelPatcher).

    path             file or folder in any dialect
    ops              the op set its layers compute with
    activations      "auto" | "4 bit" | "8 bit": as the file has them, or wider (activations.py)
    disable_dynamic  the host asks for a patcher without dynamic VRAM when it delegates hooks or compile
    returns          the host's own patcher around the host's own model class

    Raises ValueError, with file, key and remedy, before anything of a bad file is kept.
    """
    start, device = time.perf_counter(), comfy.model_management.get_torch_device()
    wide = widths.in_eight_bits(activations, device)
    checkpoint = open_checkpoint(Path(path))
    family = family_of(checkpoint)
    mapped = family.map_names(checkpoint)
    progress = comfy.utils.ProgressBar(len(mapped.linears))
    state_dict = make_state_dict(checkpoint, mapped, lambda: progress.update(1), device if wide else None)
    patcher = _build(checkpoint, family, state_dict, ops, disable_dynamic)
    if ops is kernel_ops:
        fused = [op for op in FUSED_OPS if ops.fuses(op, device.type, device.index)]
        feed_forward.install(patcher.model, fused)
        single_block.install(patcher.model, fused)
    branches.attach(patcher)
    patcher.cached_patcher_init = (load_model, (str(path), ops, activations))
    patcher.set_attachments(branches.KEY, Source(checkpoint.path, checkpoint.dialect, family.name))
    _report(checkpoint, family, mapped, patcher, wide, time.perf_counter() - start)
    return patcher


class Source:
    """Where a loaded model came from; the inspect node reads it off the patcher."""

    def __init__(self, path: Path, dialect: str, family: str) -> None:
        self.path, self.dialect, self.family = path, dialect, family


def family_of(checkpoint: Checkpoint, kind: str = "diffusion model") -> Family:
    """The family of a checkpoint. ValueError if it is unknown or of another kind."""
    family = resolve(checkpoint)
    if family is None:
        example = next(iter(checkpoint.info))
        raise ValueError(
            f"{checkpoint.path.name}: no known model family has a layer named {example!r}. "
            "Supported families are listed in the README; `tools/svdquant inspect` shows what the file holds."
        )
    if family.kind != kind:
        node = "SVDQuant Load Text Encoder" if family.kind == "text encoder" else "SVDQuant Load Model"
        raise ValueError(
            f"{checkpoint.path.name}: expected a {kind}, got a {family.kind}. Load it with {node}."
        )
    return family


def make_state_dict(
    checkpoint: Checkpoint,
    mapped: Mapped,
    advance: Callable[[], None],
    widen_on: torch.device | None = None,
) -> dict[str, Tensor]:
    """The host's state dict: quantized tensors for the linears, 16-bit tensors for the rest, layer by layer.

    widen_on  the device that makes 8-bit layers of 4-bit ones; None leaves them as they are
    """
    layout.register()
    reader, state_dict = _Reader(checkpoint), {}
    for host, pieces in sorted(mapped.linears.items(), key=lambda linear: [name for name, _ in linear[1]]):
        stored = [reader.read(name, role) for name, role in pieces]
        parts, bias = assemble(stored, mapped.axes[host])
        if widen_on is not None:
            parts = widths.widen(parts, widen_on)
        state_dict[f"{host}.weight"] = layout.pack(parts, _dtype(checkpoint))
        if bias is not None:
            state_dict[f"{host}.bias"] = bias.clone()
        advance()
    for host, source in mapped.plain.items():
        state_dict[host] = source.read(checkpoint.plain)
    share_inputs(state_dict)
    return state_dict


class _Reader:
    """Decodes stored linears by role; keeps the last one, because a fused one serves several host layers.

    So layers that share one must be read in a row.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._name = checkpoint, ""

    def read(self, name: str, role: Role) -> LinearWeights:
        if name != self._name:
            self._name, self._weights = name, self._whole(name, role)
        return take_share(self._weights, role.share) if role.share else self._weights

    def _whole(self, name: str, role: Role) -> LinearWeights:
        stored = self._checkpoint.layers[name]
        try:
            weights = apply_role(stored, role)
            return straighten(weights, role.splits) if role.splits else weights
        except ValueError as error:
            raise ValueError(f"{self._checkpoint.path.name}: {name}: {error}") from None


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The 16-bit dtype of the file: what the plain tensors are stored in."""
    dtypes = {
        info.dtype for info in checkpoint.plain_info.values() if info.dtype in (torch.float16, torch.bfloat16)
    }
    return dtypes.pop() if len(dtypes) == 1 else torch.bfloat16


def _build(
    checkpoint: Checkpoint,
    family: Family,
    state_dict: dict[str, Tensor],
    ops: ModuleType,
    disable_dynamic: bool,
):
    given = set(state_dict)
    options = {"custom_operations": make_operations(ops), "dtype": _dtype(checkpoint)}
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict,
            model_options=options,
            metadata=dict(checkpoint.metadata),
            disable_dynamic=disable_dynamic,
        )
    except RuntimeError as error:  # torch collects every shape mismatch in one message
        raise ValueError(
            f"{checkpoint.path.name}: the host's model class disagrees with the file. {error}"
        ) from error
    if patcher is None:
        raise ValueError(
            f"{checkpoint.path.name}: this ComfyUI does not recognise the model's shapes. "
            "Update ComfyUI, or check that the file is whole."
        )
    model = patcher.model.diffusion_model
    check_complete(checkpoint, model, given, optional=family.optional, strict=family.strict)
    return patcher


def check_complete(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    given: set[str],
    *,
    optional: str = "",
    strict: bool = True,
) -> None:
    """Every tensor the host's class wants was in the file, and every one in the file was wanted.

    optional, strict   as the family's
    """

    def published(name: str) -> str:  # hosts renamed RMSNorm's `scale`; files keep the old name
        return name.removesuffix(".scale") + ".weight" if name.endswith("_norm.scale") else name

    wanted = {published(name) for name in model.state_dict()}
    had = {published(name) for name in given}
    wanted = {name for name in wanted if name in had or not re.fullmatch(optional, name)}
    if not strict:
        had = {name for name in had if name in wanted or name.rpartition(".")[0] in checkpoint.info}
    for problem, names in (("is missing", wanted - had), ("has no place in this model", had - wanted)):
        if names:
            raise ValueError(
                f"{checkpoint.path.name}: {sorted(names)[0]} {problem}, and {len(names) - 1} more like it. "
                "The file is incomplete or of another model; download it again."
            )


def _report(
    checkpoint: Checkpoint, family: Family, mapped: Mapped, patcher, wide: bool, seconds: float
) -> None:
    for warning in checkpoint.warnings:
        log.warning("%s: %s", checkpoint.path.name, warning)
    if mapped.left_over:
        log.warning(
            "%s: %d tensors not used, such as %s",
            checkpoint.path.name,
            len(mapped.left_over),
            mapped.left_over[0],
        )
    layers = [layer for _, layer in quantized_linears(patcher.model)]
    log.info(
        "SVDQuant: %s (%s, %s): %d quantized layers, %s-bit activations, %.1f MB, computed by %s, loaded in %.1f s",
        checkpoint.path.name,
        checkpoint.dialect,
        family.name,
        len(layers),
        8 if wide else 4,
        sum(layer.weight.nbytes for layer in layers) / 2**20,
        kernel_ops.describe(patcher.load_device.type, patcher.load_device.index, wide=wide),
        seconds,
    )
