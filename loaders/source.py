"""A 16-bit diffusion model as the quantizer reads it, and the `Job`s that say what to make of it.

    open_source(path)   a .safetensors file or a folder of shards, in bf16, fp16, fp32 or scaled fp8
    Job                 one linear of the file to write: which rectangle of which source linear, in which precision

Names are the source's own without a leading `model.diffusion_model.`; a checkpoint's text encoders and VAE are left
out, and said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Lazy
from .detect import DIALECTS, is_lora
from .tensorfile import TensorFile, join_files

Span = tuple[int, int | None]
Change = Callable[[Tensor], Tensor] | None
ALL: Span = (0, None)
OTHER_MODELS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.", "clip_")
OTHER_MODELS += ("model_ema.", "denoiser.")
PREFIXES = ("diffusion_model.", "transformer.", "unet.")
SCALES = ("scale_weight", "weight_scale")  # of fp8 weights, in older and newer files
BOOKKEEPING = ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "scaled_fp8")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NO_WEIGHTS = (torch.uint8, torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Fold:
    """Bias rows that take the mean of a later linear's input away before it arrives there.

    rows     of the source's weight and bias
    input    the statistics' name of that input
    columns  of that input
    """

    rows: Span
    input: str
    columns: Span = ALL


@dataclass(frozen=True)
class Job:
    """One linear to write.

    name        in the file
    source      the source linear it is cut from
    precision   int4 | nvfp4 | awq | plain (16 bits)
    rank        of the branch
    rows        output rows of the source, first and behind the last
    columns     input columns of the source, likewise
    has_bias    whether the source's bias goes here
    after_gelu  its inputs are above -0.17: unsigned codes in int4
    chunks      of a modulation, whose rows are interleaved and whose scale rows get a 1 added; else 0
    center      whose mean may be taken out of this linear's input, None where no bias could do that
    folds       what this linear's bias has to take out for others
    input       the statistics' name of its input; the source's own when empty
    """

    name: str
    source: str
    precision: str
    rank: int = 0
    rows: Span = ALL
    columns: Span = ALL
    has_bias: bool = True
    after_gelu: bool = False
    chunks: int = 0
    center: str | None = None
    folds: tuple[Fold, ...] = ()
    input: str = ""

    @property
    def reads(self) -> str:
        """The statistics' name of its input."""
        return self.input or self.source


@dataclass(frozen=True, eq=False)
class SourceModel:
    """The tensors of a 16-bit model.

    path     the file or folder
    shapes   name -> shape, from headers
    tensors  name -> Tensor, memory-mapped, fp8 already scaled
    notes    what was left out and why
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight [N, K] and bias [N] or None of a linear, in fp32."""
        bias = self.tensors[f"{name}.bias"].float() if f"{name}.bias" in self.shapes else None
        return self.tensors[f"{name}.weight"].float(), bias

    def finite(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor as it is, or in another dtype. ValueError if it holds NaN or infinity, or then would."""
        tensor = self.tensors[name] if dtype is None else self.tensors[name].to(dtype)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            within = "" if dtype is None else f" within {dtype}"
            raise ValueError(
                f"{self.path.name}: {name}: expected finite numbers{within}, got others. "
                "The source file is damaged."
            )
        return tensor

    def cut(self, job: Job) -> tuple[Tensor, Tensor | None]:
        """The rectangle a job is made of, and the bias rows that go with it."""
        weight, bias = self.linear(job.source)
        rows, columns = slice(*job.rows), slice(*job.columns)
        return weight[rows, columns].contiguous(), None if bias is None or not job.has_bias else bias[rows]

    def renamed(self, names: Mapping[str, tuple[tuple[str, ...], Change]]) -> SourceModel:
        """The same model under other names.

        names   new name -> (old names, joined by rows; a change of the joined tensor or None)
        """

        def make(name: str) -> Tensor:
            old, change = names[name]
            joined = torch.cat([self.tensors[n] for n in old]) if len(old) > 1 else self.tensors[old[0]]
            return change(joined) if change else joined

        shapes = {new: _joined([self.shapes[n] for n in old]) for new, (old, _) in names.items()}
        return SourceModel(self.path, shapes, Lazy(names, make), self.notes)


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else shapes[0]


def open_source(path: str | Path) -> SourceModel:
    """Open a 16-bit model, headers only.

    Raises ValueError for a file that is quantized already, holds no model, or is damaged.
    """
    path = Path(path)
    files = join_files(path, _shards(path))
    _refuse_others(files)
    names, notes = _model_names(files)
    shapes = {new: files.info[old].shape for new, old in names.items()}
    if not any(len(shape) == 2 for shape in shapes.values()):
        raise ValueError(
            f"{path.name}: expected the linears of a diffusion model, got none. Name another file."
        )
    return SourceModel(path, shapes, Lazy(names, lambda name: _tensor(files, names[name])), notes)


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{path}: expected .safetensors files in the folder, got none. Name a model file.")
    return shards


def _refuse_others(files: TensorFile) -> None:
    if is_lora(files):
        raise ValueError(f"{files.path.name}: expected a 16-bit model, got a LoRA. Name a model file.")
    for dialect in DIALECTS:
        if dialect.detect(files):
            raise ValueError(
                f"{files.path.name}: expected a 16-bit model, got one that is in 4 bits already. "
                "Quantize its 16-bit original."
            )
    for name, info in files.info.items():
        if name.endswith(".weight") and info.dtype in NO_WEIGHTS:
            raise ValueError(
                f"{files.path.name}: {name}: expected a 16-bit or fp8 weight, got {info.dtype}. "
                "The model is quantized already; use its 16-bit original."
            )


def _model_names(files: TensorFile) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names of the diffusion model -> names in the file, and a note on the rest."""
    others = [name for name in files if name.startswith(OTHER_MODELS)]
    kept = [name for name in files if not name.startswith(OTHER_MODELS)]
    kept = [name for name in kept if name.rpartition(".")[2] not in BOOKKEEPING]
    prefix = next((p for p in PREFIXES if kept and all(name.startswith(p) for name in kept)), "")
    note = f"{len(others)} tensors of text encoders, VAE and the like were left out; only the model is quantized."
    return {name.removeprefix(prefix): name for name in kept}, (note,) if others else ()


def _tensor(files: TensorFile, name: str) -> Tensor:
    tensor, layer = files[name], name.rpartition(".")[0]
    if tensor.dtype not in FP8:
        return tensor
    scales = [files[f"{layer}.{scale}"] for scale in SCALES if f"{layer}.{scale}" in files]
    value = tensor.float()
    if scales and name.endswith(".weight"):
        value = value * scales[0].float().reshape(-1, *[1] * (value.ndim - 1))
    return value.to(torch.bfloat16)


def plain_tensors(source: SourceModel, names: Iterable[tuple[str, str, Change]]) -> Lazy[Tensor]:
    """A lazy mapping of the tensors that stay as they are: (name in the file, name in the source, change)."""
    table = {new: (old, change) for new, old, change in names}

    def make(name: str) -> Tensor:
        old, change = table[name]
        return change(source.tensors[old]) if change else source.tensors[old]

    return Lazy(table, make)
