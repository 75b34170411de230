"""Text encoder files become a host CLIP whose encoders compute with 4-bit linears.

The host builds its own encoder classes and tokenizers; only Linear is ours, through custom operations, as in
diffusion models. It computes in fp32 whatever the weights are, so that fp16 weights overflow nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...loaders.checkpoint import Checkpoint
from ...loaders.detect import open_tensors, read_quantized
from ...loaders.source import SCALES
from ...loaders.tensorfile import TensorFile
from ..kernels import ops as kernel_ops
from . import encoder_sizes
from .encoder_types import check_count, check_files
from .families import t5
from .family import Family
from .load import Source, check_complete, family_of, make_state_dict
from .lora import branches
from .operations import make_operations, quantized_linears
from .patcher import refuse_saving

log = logging.getLogger("svdquant-nodes")

# Up to a gigabyte that most of the host's classes have no place for, and so given as it lies in the file.
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Request:
    """What to load, and how.

    paths       the files, some of them in 4 bits
    kind        of encoder_types.TYPES
    device      "default" leaves it to the host, "cpu" keeps the encoders off the GPU
    min_length  prompts are padded to so many T5 tokens; 0 for the model's own length
    """

    paths: tuple[Path, ...]
    kind: str = "flux"
    device: str = "default"
    min_length: int = 0

    def __post_init__(self) -> None:
        check_count(self.kind, len(self.paths))


@dataclass(frozen=True, eq=False)
class Opened:
    """A file, and what it is if it is in 4 bits."""

    files: TensorFile
    checkpoint: Checkpoint | None
    family: Family | None


def load_clip(request: Request, ops: ModuleType = kernel_ops, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Load text encoders as an ordinary host CLIP.

    ops              the op set the 4-bit layers compute with
    disable_dynamic  as in load.load_model

    Raises ValueError, with file, key and remedy, for files that are no text encoders or do not go together.
    """
    start = time.perf_counter()
    opened = [_open(path) for path in request.paths]
    check_files(request.kind, [one.files for one in opened])
    if any(one.checkpoint for one in opened):
        clip = _load(request, opened, ops, disable_dynamic)
        _report(opened, clip, time.perf_counter() - start)
    else:
        files = [str(path) for path in request.paths]
        clip = comfy.sd.load_clip(files, _embeddings(), _type(request.kind), _devices(request.device))
    if request.min_length:
        clip.set_tokenizer_option("t5xxl_min_length", request.min_length)
    return clip


def load_patcher(request: Request, ops: ModuleType = kernel_ops, disable_dynamic: bool = False):
    """The patcher alone: what the host asks for when it wants one of another kind."""
    return load_clip(request, ops, disable_dynamic).patcher


def _open(path: Path) -> Opened:
    files = open_tensors(path)
    checkpoint = read_quantized(files)
    return Opened(files, checkpoint, family_of(checkpoint, "text encoder") if checkpoint else None)


def _load(
    request: Request, opened: Sequence[Opened], ops: ModuleType, disable_dynamic: bool
) -> comfy.sd.CLIP:
    states, options = [], {"custom_operations": make_operations(ops), **_devices(request.device)}
    for one in opened:
        states.append(_encoder_state(one) if one.checkpoint else _plain_state(one.files))
        if one.checkpoint:
            options |= encoder_sizes.options(one.files.path, one.family.name, states[-1])
    first = next(one for one in opened if one.checkpoint)
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            states, _embeddings(), _type(request.kind), model_options=options, disable_dynamic=disable_dynamic
        )
    except RuntimeError as error:  # torch collects every shape mismatch in one message
        raise ValueError(
            f"{first.files.path.name}: the host's encoder class disagrees with the file. {error}"
        ) from error
    for one, state in zip(opened, states, strict=True):  # under the names that the host gave them meanwhile
        if one.checkpoint:
            _check_encoder(one, clip, set(state), request.kind)
    _fill(clip.cond_stage_model)
    branches.attach(clip.patcher)
    clip.tokenizer.state_dict = refuse_saving  # clones share it, and only savers ask for it
    clip.patcher.cached_patcher_init = (load_patcher, (request, ops))
    source = Source(first.checkpoint.path, first.checkpoint.dialect, first.family.name)
    clip.patcher.set_attachments(branches.KEY, source)
    return clip


def _encoder_state(one: Opened) -> dict[str, Tensor]:
    checkpoint, mapped = one.checkpoint, one.family.map_names(one.checkpoint)
    progress = comfy.utils.ProgressBar(len(mapped.linears))
    stray = [name for name in mapped.left_over if name != t5.TABLE_AGAIN]
    if stray:
        log.warning("%s: %d tensors not used, such as %s", checkpoint.path.name, len(stray), stray[0])
    heads = [name for name in mapped.plain if name.endswith(HEAD)]
    others = {name: source for name, source in mapped.plain.items() if name not in heads}
    state = make_state_dict(checkpoint, replace(mapped, plain=others), lambda: progress.update(1))
    return state | {name: checkpoint.plain[name] for name in heads}


def _plain_state(files: TensorFile) -> dict[str, Tensor]:
    """The tensors of an ordinary encoder beside those in 4 bits."""
    scaled = [name for name in files if name.rpartition(".")[2] in (*SCALES, "comfy_quant", "scaled_fp8")]
    if scaled:
        raise ValueError(
            f"{files.path.name}: {scaled[0]}: expected a 16-bit text encoder beside the 4-bit one, got a quantized "
            "one. Choose its fp16 file."
        )
    return {name: files[name].clone() for name in files}


def _devices(device: str) -> dict:
    """The host's own devices, or the CPU alone; weights begin where they rest."""
    if device == "cpu":
        return dict.fromkeys(("load_device", "offload_device", "initial_device"), torch.device("cpu"))
    return {"initial_device": comfy.model_management.text_encoder_offload_device()}


def _embeddings() -> list[str]:
    return folder_paths.get_folder_paths("embeddings")


def _type(kind: str) -> comfy.sd.CLIPType:
    return getattr(comfy.sd.CLIPType, kind.upper())


def _check_encoder(one: Opened, clip: comfy.sd.CLIP, given: set[str], kind: str) -> None:
    """The host built this encoder, and it has every tensor of the file and no other."""
    models = [
        m.transformer for m in clip.cond_stage_model.modules() if isinstance(m, comfy.sd1_clip.SDClipModel)
    ]
    model = max(models, key=lambda m: len(given & set(m.state_dict())), default=None)
    if model is None or not given & set(model.state_dict()):
        raise ValueError(
            f"{one.files.path.name}: this ComfyUI makes no {one.family.name} of these files for type {kind}. "
            "Choose another type, or check the files."
        )
    check_complete(one.checkpoint, model, given, strict=one.family.strict)


def _fill(model: torch.nn.Module) -> None:
    """Zeros for what an encoder beside has no tensor for; the host has said so."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, torch.nn.Parameter(torch.zeros_like(parameter, device="cpu"), False))


def _report(opened: Sequence[Opened], clip: comfy.sd.CLIP, seconds: float) -> None:
    quantized = [one for one in opened if one.checkpoint]
    for checkpoint in (one.checkpoint for one in quantized):
        for warning in checkpoint.warnings:
            log.warning("%s: %s", checkpoint.path.name, warning)
    layers = [layer for _, layer in quantized_linears(clip.patcher.model)]
    log.info(
        "SVDQuant: %s: %d quantized layers, %.1f MB, runs on %s, loaded in %.1f s",
        ", ".join(
            f"{one.files.path.name} ({one.checkpoint.dialect}, {one.family.name})" for one in quantized
        ),
        len(layers),
        sum(layer.weight.nbytes for layer in layers) / 2**20,
        clip.patcher.load_device,
        seconds,
    )
