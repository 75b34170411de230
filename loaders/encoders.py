"""Which text encoder a file holds, and which of its linears 4 bits are for: one row an architecture.

Files of 16 bits and of 4 are told alike, since modules have the same names in both. What a row does not list stays as
it is: token tables, norms, output heads, the vision towers of Qwen-VL and Gemma, tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_T5 = r"encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(wi|wi_0|wi_1|wo))"
_DECODER = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_PIECES = "spiece_model"
_FIRST = r"model\.layers\.0\."


@dataclass(frozen=True)
class Encoder:
    """One architecture of text encoders.

    name       shown to users
    marks      regular expressions: a file holds it if each matches how some name begins, and no row above does
    linears    regular expression of the linears that can be quantized, "" where none is worth it
    tokenizer  the tensor that ComfyUI reads the tokenizer from, "" where it has its own
    """

    name: str
    marks: tuple[str, ...]
    linears: str = ""
    tokenizer: str = ""


ENCODERS = (
    # CLIP in Hugging Face's names, and in OpenAI's; the deeper ones first
    Encoder("CLIP-G", (r"(text_model\.encoder\.layers|transformer\.resblocks)\.30\.",)),
    Encoder("CLIP-H", (r"(text_model\.encoder\.layers|transformer\.resblocks)\.22\.",)),
    Encoder("CLIP-L", (r"(text_model\.encoder\.layers|transformer\.resblocks)\.0\.",)),
    Encoder("T5 1.0", (r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wi\.",), _T5),
    Encoder(
        "UMT5", (r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.",), _T5, _PIECES
    ),
    Encoder("T5", (r"encoder\.block\.0\.layer\.0\.SelfAttention\.",), _T5),
    Encoder("Gemma 4", (rf"{_FIRST}layer_scalar",)),
    Encoder(
        "Gemma 3",
        (rf"{_FIRST}post_feedforward_layernorm\.", rf"{_FIRST}self_attn\.q_norm\."),
        rf"model\.{_DECODER}",
        _PIECES,
    ),
    Encoder("Gemma 2", (rf"{_FIRST}post_feedforward_layernorm\.",), rf"model\.{_DECODER}", _PIECES),
    Encoder(
        "Qwen3-VL",
        (r"model\.visual\.deepstack_merger_list\.", r"model\.language_model\.layers\.0\."),
        rf"model\.language_model\.{_DECODER}",
    ),
    Encoder("Qwen2.5-VL", (rf"{_FIRST}self_attn\.k_proj\.bias",), rf"model\.{_DECODER}"),
    Encoder("Qwen3", (rf"{_FIRST}self_attn\.q_norm\.",), rf"model\.{_DECODER}"),
    Encoder("Mistral", (r"tekken_model", rf"{_FIRST}post_attention_layernorm\."), rf"model\.{_DECODER}"),
    Encoder("Llama 3.1", (rf"{_FIRST}post_attention_layernorm\.",), rf"model\.{_DECODER}"),
)
QUANTIZED = tuple(encoder.name for encoder in ENCODERS if encoder.linears)


def recognise(names: Iterable[str]) -> Encoder | None:
    """The row of the text encoder whose tensors have these names, None if they are something else's."""
    names = list(names)
    return next((row for row in ENCODERS if all(_any(mark, names) for mark in row.marks)), None)


def _any(mark: str, names: list[str]) -> bool:
    begins = re.compile(mark).match
    return any(begins(name) for name in names)
