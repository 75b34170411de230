"""The types of ComfyUI's CLIP loaders that have an encoder worth 4 bits, and which files each of them takes.

The host builds something of any files, and leaves out what is missing; so what goes together is said here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import comfy.sd

from ...loaders.detect import explain
from ...loaders.encoders import recognise
from ...loaders.tensorfile import TensorFile


@dataclass(frozen=True)
class EncoderType:
    """What a model wants.

    text    for users
    names   of loaders/encoders.py, each of which may be there once
    counts  numbers of files
    """

    text: str
    names: tuple[str, ...]
    counts: tuple[int, ...] = (1,)


def _alone(*names: str) -> EncoderType:
    return EncoderType(" or ".join(names), names)


def _with(name: str, other: str, counts: tuple[int, ...] = (2,)) -> EncoderType:
    kind = "T5" if other == "ByT5" else other  # one architecture, in another size
    return EncoderType(
        f"{name}, alone or with {other}" if 1 in counts else f"{name} and {other}", (name, kind), counts
    )


TYPES = {
    "flux": _with("CLIP-L", "T5"),
    "sd3": EncoderType("T5, alone or with CLIP-L and CLIP-G", ("T5", "CLIP-L", "CLIP-G"), (1, 2, 3)),
    **dict.fromkeys(("pixart", "chroma", "ltxv", "mochi", "cogvideox"), _alone("T5")),
    "cosmos": _alone("T5 1.0"),
    "hidream": EncoderType(
        "T5 or Llama 3.1, alone or with one of T5, Llama 3.1, CLIP-L and CLIP-G, or all four",
        ("T5", "Llama 3.1", "CLIP-L", "CLIP-G"),
        (1, 2, 4),
    ),
    "qwen_image": _alone("Qwen2.5-VL"),
    "lumina2": _alone("Qwen3", "Gemma 2", "Gemma 3"),
    "flux2": _alone("Qwen3", "Mistral", "Qwen3-VL"),
    "wan": _alone("UMT5"),
    "hunyuan_video": _with("Llama 3.1", "CLIP-L"),
    "hunyuan_video_15": _with("Qwen2.5-VL", "ByT5"),
    "hunyuan_image": _with("Qwen2.5-VL", "ByT5", (1, 2)),
    "kandinsky5": _with("Qwen2.5-VL", "CLIP-L"),
    "kandinsky5_image": _with("Qwen2.5-VL", "CLIP-L"),
    **dict.fromkeys(("longcat_image", "omnigen2"), _alone("Qwen2.5-VL")),
    "ovis": _alone("Qwen3"),
    "pixeldit": _alone("Gemma 2"),
    "ideogram4": _alone("Qwen3", "Qwen3-VL"),
    **dict.fromkeys(("boogu", "krea2", "joyimage", "mage"), _alone("Qwen3-VL")),
}


def available() -> list[str]:
    """The types that this ComfyUI knows."""
    return [name for name in TYPES if hasattr(comfy.sd.CLIPType, name.upper())]


def check_count(name: str, files: int) -> None:
    """Raise a ValueError unless the type exists and takes so many files."""
    if name not in available():
        raise ValueError(f"type: expected one of {', '.join(available())}, got {name!r}.")
    kind = TYPES[name]
    if files not in kind.counts:
        raise ValueError(
            f"type {name}: expected {' or '.join(map(str, kind.counts))} files ({kind.text}), got {files}. "
            "Choose the files, and none where nothing belongs."
        )


def check_files(name: str, opened: Iterable[TensorFile]) -> None:
    """Raise a ValueError unless each file holds an encoder that the type wants, and no two the same."""
    kind, found = TYPES[name], {}
    for files in opened:
        encoder = recognise(files)
        wanted = f"{files.path.name}: expected a text encoder for type {name} ({kind.text}), got"
        if encoder is None:
            raise ValueError(f"{wanted} {explain(files)}")
        if encoder.name not in kind.names:
            raise ValueError(
                f"{wanted} {encoder.name}. Choose another file, or the type of the model it is for."
            )
        if encoder.name in found:
            raise ValueError(
                f"{wanted} {encoder.name} a second time, after {found[encoder.name]}. "
                "Choose another file for one of them."
            )
        if encoder.tokenizer and encoder.tokenizer not in files:
            raise ValueError(
                f"{files.path.name}: {encoder.tokenizer}: expected the tokenizer in the file, as in ComfyUI's own "
                f"files of {encoder.name}, got none. Use one of those, or quantize again from one."
            )
        found[encoder.name] = files.path.name
