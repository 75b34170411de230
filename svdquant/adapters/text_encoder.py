"""Text encoder files become a host CLIP whose T5 computes with 4-bit linears.

The host builds its own encoder classes and tokenizers; only Linear is ours, through custom operations, as in
diffusion models. Its T5 runs in fp32 whatever the weights are, so that fp16 weights overflow nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import comfy.model_management
import comfy.sd
import comfy.text_encoders.t5
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...loaders.checkpoint import Checkpoint
from ...loaders.detect import explain, open_tensors, read_quantized
from ...loaders.source import SCALES
from ...loaders.tensorfile import TensorFile
from ..kernels import ops as kernel_ops
from .families import t5
from .family import Mapped
from .load import Source, check_complete, family_of, make_state_dict
from .lora import branches
from .operations import make_operations, quantized_linears
from .patcher import refuse_saving

log = logging.getLogger("svdquant-nodes")

# What a family's encoder is made of, by the names of ENCODERS. The numbers of files are the host's.
KINDS = {
    "flux": ("CLIP-L and T5", (2,)),
    "sd3": ("T5, alone or with CLIP-L and CLIP-G", (1, 2, 3)),
    "pixart": ("T5", (1,)),
    "chroma": ("T5", (1,)),
    "ltxv": ("T5", (1,)),
    "mochi": ("T5", (1,)),
    "hidream": ("T5, alone or with Llama 3.1, CLIP-L or CLIP-G", (1, 2)),
}

# Encoders by a name that each has, the deeper ones first; OpenAI's own names for CLIP are the second ones.
ENCODERS = (
    ("CLIP-G", r"(text_model\.encoder\.layers|transformer\.resblocks)\.30\."),
    ("CLIP-H", r"(text_model\.encoder\.layers|transformer\.resblocks)\.22\."),
    ("CLIP-L", r"(text_model\.encoder\.layers|transformer\.resblocks)\.0\."),
    ("T5", r"encoder\.block\.0\.layer\.0\.SelfAttention\."),
    ("Llama 3.1", r"model\.layers\.0\.post_attention_layernorm\."),
)


@dataclass(frozen=True)
class Request:
    """What to load, and how.

    paths       the files, one of them a 4-bit T5
    kind        of KINDS
    device      "default" leaves it to the host, "cpu" keeps the encoder off the GPU
    min_length  prompts are padded to so many T5 tokens; 0 for the family's own length
    """

    paths: tuple[Path, ...]
    kind: str = "flux"
    device: str = "default"
    min_length: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"type: expected one of {', '.join(KINDS)}, got {self.kind!r}.")
        made_of, counts = KINDS[self.kind]
        if len(self.paths) not in counts:
            raise ValueError(
                f"type {self.kind}: expected {' or '.join(map(str, counts))} files ({made_of}), got "
                f"{len(self.paths)}. Choose the files, and none where nothing belongs."
            )


def load_clip(request: Request, ops: ModuleType = kernel_ops, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Load text encoders as an ordinary host CLIP.

    ops              the op set the 4-bit layers compute with
    disable_dynamic  as in load.load_model

    Raises ValueError, with file, key and remedy, for files that are no text encoders or do not go together.
    """
    start = time.perf_counter()
    opened = [open_tensors(path) for path in request.paths]
    checkpoint = _the_quantized(opened)
    if checkpoint is None:
        _check_files(request, opened)
        files = [str(path) for path in request.paths]
        clip = comfy.sd.load_clip(files, _embeddings(), _type(request.kind), _devices(request.device))
    else:
        clip = _load(request, opened, checkpoint, ops, disable_dynamic)
        _report(checkpoint, clip, time.perf_counter() - start)
    if request.min_length:
        clip.set_tokenizer_option("t5xxl_min_length", request.min_length)
    return clip


def load_patcher(request: Request, ops: ModuleType = kernel_ops, disable_dynamic: bool = False):
    """The patcher alone: what the host asks for when it wants one of another kind."""
    return load_clip(request, ops, disable_dynamic).patcher


def _the_quantized(opened: Sequence[TensorFile]) -> Checkpoint | None:
    """The one 4-bit file among those opened; None if all are ordinary."""
    found = [checkpoint for files in opened if (checkpoint := read_quantized(files))]
    if len(found) > 1:
        raise ValueError(
            f"{found[1].path.name}: expected one 4-bit text encoder, got {found[0].path.name} as well. "
            "Choose another file for one of them."
        )
    return found[0] if found else None


def _check_files(request: Request, opened: Sequence[TensorFile]) -> None:
    """Each file holds an encoder that the type wants, and no two the same: the host would leave out what is missing."""
    made_of, found = KINDS[request.kind][0], {}
    for files in opened:
        name = next((name for name, mark in ENCODERS if any(re.match(mark, key) for key in files)), None)
        wanted = f"{files.path.name}: expected a text encoder for type {request.kind} ({made_of}), got"
        if name is None:
            raise ValueError(f"{wanted} {explain(files)}")
        if name not in made_of:
            raise ValueError(f"{wanted} {name}. Choose another file, or the type of the model it is for.")
        if name in found:
            raise ValueError(
                f"{wanted} {name} a second time, after {found[name]}. Choose another file for one of them."
            )
        found[name] = files.path.name


def _load(
    request: Request,
    opened: Sequence[TensorFile],
    checkpoint: Checkpoint,
    ops: ModuleType,
    disable_dynamic: bool,
) -> comfy.sd.CLIP:
    family = family_of(checkpoint, "text encoder")
    _check_files(request, opened)
    encoder = _encoder_state(checkpoint, family.map_names(checkpoint))
    given = set(encoder)
    states = [encoder if files is checkpoint.stored else _plain_state(files) for files in opened]
    options = _devices(request.device)
    options |= {"custom_operations": make_operations(ops), "t5xxl_model_config": sizes(checkpoint, encoder)}
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            states, _embeddings(), _type(request.kind), model_options=options, disable_dynamic=disable_dynamic
        )
    except RuntimeError as error:  # torch collects every shape mismatch in one message
        raise ValueError(
            f"{checkpoint.path.name}: the host's encoder class disagrees with the file. {error}"
        ) from error
    _check_encoder(checkpoint, clip, given, request.kind)
    branches.attach(clip.patcher)
    clip.tokenizer.state_dict = refuse_saving  # clones share it, and only savers ask for it
    clip.patcher.cached_patcher_init = (load_patcher, (request, ops))
    clip.patcher.set_attachments(branches.KEY, Source(checkpoint.path, checkpoint.dialect, family.name))
    return clip


def _encoder_state(checkpoint: Checkpoint, mapped: Mapped) -> dict[str, Tensor]:
    progress = comfy.utils.ProgressBar(len(mapped.linears))
    stray = [name for name in mapped.left_over if name != t5.TABLE_AGAIN]
    if stray:
        log.warning("%s: %d tensors not used, such as %s", checkpoint.path.name, len(stray), stray[0])
    return make_state_dict(checkpoint, mapped, lambda: progress.update(1))


def _plain_state(files: TensorFile) -> dict[str, Tensor]:
    """The tensors of an ordinary encoder beside T5."""
    scaled = [name for name in files if name.rpartition(".")[2] in (*SCALES, "comfy_quant", "scaled_fp8")]
    if scaled:
        raise ValueError(
            f"{files.path.name}: {scaled[0]}: expected a 16-bit text encoder beside the 4-bit one, got a quantized "
            "one. Choose its fp16 file."
        )
    return {name: files[name].clone() for name in files}


def sizes(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the host's class is made with, from the tensors. ValueError names one that is missing."""
    attention = "encoder.block.0.layer.0.SelfAttention."
    names = (t5.TABLE, f"{attention}q.weight", f"{attention}relative_attention_bias.weight")
    names += ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight",)
    for name in names:
        if name not in state:
            raise ValueError(
                f"{checkpoint.path.name}: {name} is missing. The file is incomplete; download it again."
            )
    table, q, bias, wi = (state[name].shape for name in names)
    blocks = {int(name.split(".")[2]) for name in state if name.startswith("encoder.block.")}
    return {
        "vocab_size": table[0],
        "d_model": table[1],
        "num_heads": bias[1],
        "d_kv": q[0] // bias[1],
        "d_ff": wi[0],
        "num_layers": max(blocks) + 1,
    }


def _devices(device: str) -> dict:
    """The host's own devices, or the CPU alone; weights begin where they rest."""
    if device == "cpu":
        return dict.fromkeys(("load_device", "offload_device", "initial_device"), torch.device("cpu"))
    return {"initial_device": comfy.model_management.text_encoder_offload_device()}


def _embeddings() -> list[str]:
    return folder_paths.get_folder_paths("embeddings")


def _type(kind: str) -> comfy.sd.CLIPType:
    return getattr(comfy.sd.CLIPType, kind.upper())


def _check_encoder(checkpoint: Checkpoint, clip: comfy.sd.CLIP, given: set[str], kind: str) -> None:
    """The host built a T5, and it has every tensor of the file and no other."""
    model = clip.cond_stage_model
    encoder = next((m for m in model.modules() if isinstance(m, comfy.text_encoders.t5.T5)), None)
    if encoder is None or not given & set(encoder.state_dict()):
        raise ValueError(
            f"{checkpoint.path.name}: this ComfyUI makes no T5 of these files for type {kind}, which needs "
            f"{KINDS[kind][0]}. Choose another type, or check the files."
        )
    check_complete(checkpoint, encoder, given)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:  # of another encoder; the host has said that its file lacks it
                setattr(module, name, torch.nn.Parameter(torch.zeros_like(parameter, device="cpu"), False))


def _report(checkpoint: Checkpoint, clip: comfy.sd.CLIP, seconds: float) -> None:
    for warning in checkpoint.warnings:
        log.warning("%s: %s", checkpoint.path.name, warning)
    layers = [layer for _, layer in quantized_linears(clip.patcher.model)]
    log.info(
        "SVDQuant: %s (%s, T5): %d quantized layers, %.1f MB, runs on %s, loaded in %.1f s",
        checkpoint.path.name,
        checkpoint.dialect,
        len(layers),
        sum(layer.weight.nbytes for layer in layers) / 2**20,
        clip.patcher.load_device,
        seconds,
    )
