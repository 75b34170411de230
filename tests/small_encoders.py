"""Narrow and shallow text encoders of the host's own classes, which its detection would know by their widths alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.ops
import comfy.sd
import comfy.text_encoders
import torch
from torch import Tensor

from svdquant_nodes.loaders.encoders import recognise

WORDS = 4001  # of a table that differ
HERE = Path(comfy.sd.__file__).parent / "text_encoders"
DECODER = dict(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1)
T5 = dict(vocab_size=32128, d_model=128, d_kv=64, num_heads=2, d_ff=256, num_layers=2)


@dataclass(frozen=True)
class SmallEncoder:
    """One encoder in one of the models that use it.

    name    of loaders/encoders.py
    kind    the CLIP type
    model   what the host detects: a name of its TEModel
    build   module and class of the host
    config  what the host calls the encoder in this model
    sizes   the class's own, but for these
    beside  the encoders whose files go with it
    """

    name: str
    kind: str
    model: str
    build: tuple[str, str]
    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        return self.sizes.get("num_layers") or self.sizes["num_hidden_layers"]

    def settings(self) -> dict[str, Any]:
        """The host's model options that say the sizes."""
        return {f"{self.config}_model_config": dict(self.sizes)}

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """A file: Gaussian weights, norms about one, and the tokenizer where files bring it."""
        draw, made = torch.Generator().manual_seed(seed), {}
        for name, like in self._model().state_dict().items():
            rows, *rest = like.shape
            small = 0.1 if "norm" in name or not rest else like[0].numel() ** -0.5
            if name.endswith("SelfAttention.q.weight"):
                small /= 8  # T5's attention divides by nothing
            if name.endswith(("o_proj.weight", "down_proj.weight", "SelfAttention.o.weight", "wo.weight")):
                small /= (2 * self.depth) ** 0.5  # as models begin: what layers add up to stays in bounds
            tensor = torch.randn(min(rows, WORDS), *rest, generator=draw) * small
            tensor = tensor.repeat(-(-rows // WORDS), *[1] * len(rest))[:rows]
            is_gain = "norm" in name and name.endswith("weight") and not self.name.startswith("Gemma")
            made[published(self.name, name)] = (tensor + 1 if is_gain else tensor).to(dtype)
        return made | tokenizer(self.name)

    def _model(self) -> torch.nn.Module:
        config = {**self._file(), **self.sizes}
        return _class(*self.build)(config, torch.bfloat16, "meta", comfy.ops.manual_cast)

    def _file(self) -> dict[str, Any]:
        files = {"UMT5": "umt5_config_xxl.json", "T5 1.0": "t5_old_config_xxl.json"}
        return json.loads((HERE / files[self.name]).read_text()) if self.name in files else {}


def published(encoder: str, name: str) -> str:
    """What files call a tensor of the host's class."""
    if encoder == "Qwen3-VL":
        name = (
            f"model.{name}"
            if name.startswith("visual.")
            else name.replace("model.", "model.language_model.", 1)
        )
        name = name.replace("model.language_model.lm_head", "model.lm_head")
    return name.removeprefix("model.") if "lm_head" in name else name


def _class(module: str, name: str) -> type:
    return getattr(importlib.import_module(f"comfy.text_encoders.{module}"), name)


def tokenizer(name: str) -> dict[str, Tensor]:
    """What files of this encoder carry for the host's tokenizer: any that the host can read."""
    if name in ("UMT5", "Gemma 2", "Gemma 3"):
        data = (HERE / "t5_pile_tokenizer" / "tokenizer.model").read_bytes()
        return {"spiece_model": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
    if name == "Mistral":
        return {"tekken_model": torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)}
    return {}


def _decoder(layers: int, words: int = 151936, **more: Any) -> dict[str, Any]:
    return DECODER | {"num_hidden_layers": layers, "vocab_size": words} | more


def _qwen3(kind: str, model: str, build: str, config: str, layers: int) -> SmallEncoder:
    return SmallEncoder("Qwen3", kind, model, ("llama", build), config, _decoder(layers))


def _qwen25(kind: str, *beside: str) -> SmallEncoder:
    sizes, build = _decoder(4, 152064), ("llama", "Qwen25_7BVLI")
    return SmallEncoder("Qwen2.5-VL", kind, "QWEN25_7B", build, "qwen25_7b", sizes, beside)


def _gemma(version: int, kind: str, model: str, build: str, config: str, words: int) -> SmallEncoder:
    sizes = _decoder(3, words, num_attention_heads=1)  # a head is twice as wide as others'
    return SmallEncoder(f"Gemma {version}", kind, model, ("llama", build), config, sizes)


def _llama(kind: str, words: int, *beside: str) -> SmallEncoder:
    sizes = _decoder(4, words)
    return SmallEncoder("Llama 3.1", kind, "LLAMA3_8", ("llama", "Llama2"), "llama", sizes, beside)


def _qwen3vl(kind: str, size: int, layers: int) -> SmallEncoder:
    model, build = f"QWEN3VL_{size}B", ("qwen3vl", "Qwen3VL")
    return SmallEncoder("Qwen3-VL", kind, model, build, f"qwen3vl_{size}b", _decoder(layers))


MISTRAL = ("llama", "Mistral3Small24B")
CASES = {  # depth where the host takes the text from a layer of a number
    "z-image": _qwen3("lumina2", "QWEN3_4B", "Qwen3_4B", "qwen3_4b", 3),
    "flux2-klein-9b": _qwen3("flux2", "QWEN3_8B", "Qwen3_8B", "qwen3_8b", 28),
    "ovis": _qwen3("ovis", "QWEN3_2B", "Ovis25_2B", "qwen3_2b", 2),
    "qwen-image": _qwen25("qwen_image"),
    "longcat-image": _qwen25("longcat_image"),
    "hunyuan-image": _qwen25("hunyuan_image"),
    "kandinsky5": _qwen25("kandinsky5", "CLIP-L"),
    "omnigen2": SmallEncoder(
        "Qwen2.5-VL", "omnigen2", "QWEN25_3B", ("llama", "Qwen25_3B"), "qwen25_3b", _decoder(2)
    ),
    "lumina2": _gemma(2, "lumina2", "GEMMA_2_2B", "Gemma2_2B", "gemma2_2b", 256000),
    "pixeldit": _gemma(2, "pixeldit", "GEMMA_2_2B", "Gemma2_2B", "gemma2_2b", 256000),
    "gemma3": _gemma(3, "lumina2", "GEMMA_3_4B", "Gemma3_4B", "gemma3_4b", 262208),
    "flux2-dev": SmallEncoder(
        "Mistral", "flux2", "MISTRAL3_24B", MISTRAL, "mistral3_24b", _decoder(31, 131072)
    ),
    "hidream": _llama("hidream", 128256),
    "hunyuan-video": _llama("hunyuan_video", 128320, "CLIP-L"),
    "wan": SmallEncoder("UMT5", "wan", "T5_XXL", ("t5", "T5"), "umt5xxl", T5),
    "cosmos": SmallEncoder("T5 1.0", "cosmos", "T5_XXL_OLD", ("t5", "T5"), "t5xxl", T5),
    "ideogram4": _qwen3vl("ideogram4", 8, 36),
    "boogu": _qwen3vl("boogu", 8, 3),
    "joyimage": _qwen3vl("joyimage", 8, 3),
    "krea2": _qwen3vl("krea2", 4, 36),
    "mage": _qwen3vl("mage", 4, 3),
}


def narrow(name: str, width: int) -> SmallEncoder:
    """A case whose text is as wide as a small model's."""
    sizes = CASES[name].sizes | dict(hidden_size=width, intermediate_size=2 * width)
    return replace(CASES[name], sizes=sizes)


@contextmanager
def detecting(case: SmallEncoder) -> Iterator[None]:
    """While this lasts, the host takes an encoder of this name for the case's, whatever its width, and vision towers
    are small."""
    original = comfy.sd.detect_te_model

    def detect(state: Mapping[str, Tensor]) -> Any:
        found = recognise(state)
        return comfy.sd.TEModel[case.model] if found and found.name == case.name else original(state)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(comfy.sd, "detect_te_model", detect))
        stack.enter_context(small_vision())
        stack.enter_context(mistral_tokenizer())
        yield


def mistral_tokenizer() -> Any:
    """Llama's for Mistral's, whose file hosts read with parts of older transformers alone."""
    from tokenizers import Tokenizer

    made = {
        "tokenizer_object": Tokenizer.from_file(str(HERE / "llama_tokenizer" / "tokenizer.json")),
        "legacy": False,
    }
    return mock.patch("comfy.text_encoders.flux.load_mistral_tokenizer", lambda data: made)


@contextmanager
def small_vision() -> Iterator[None]:
    """Two layers instead of thirty: no setting of the host says so."""
    import comfy.text_encoders.qwen_vl as qwen

    tower = qwen.Qwen2VLVisionTransformer

    def small(**given: Any) -> torch.nn.Module:
        return tower(**given | dict(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(qwen, "Qwen2VLVisionTransformer", small))
        if (HERE / "qwen3vl.py").exists():
            import comfy.text_encoders.qwen3vl as qwen3

            sizes = dict(hidden_size=64, intermediate_size=96, depth=2, deepstack_visual_indexes=[0, 1])
            towers = dict.fromkeys(qwen3.QWEN3VL_VISION, sizes)
            stack.enter_context(mock.patch.object(qwen3, "QWEN3VL_VISION", towers))
            stack.enter_context(mock.patch.dict(qwen3.QWEN3VL_VISION_COMMON, {"num_heads": 2}))
        yield


def known() -> dict[str, SmallEncoder]:
    """The cases that this host has a type for."""
    return {name: case for name, case in CASES.items() if hasattr(comfy.sd.CLIPType, case.kind.upper())}
