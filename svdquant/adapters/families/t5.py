"""T5 encoders (T5-XXL of FLUX.1, SD3, PixArt, Chroma, LTX-Video) on ComfyUI's `T5`, which has Hugging Face's names.

q, k and v are apart on both sides. Embeddings and norms stay 16-bit; the token table lies in files once or twice.
"""

from __future__ import annotations

from ..family import Family, Layer, Plain, Stored

_BLOCK = "encoder.block.{}.layer."
LINEARS = (
    *(f"{_BLOCK}0.SelfAttention.{name}" for name in "qkvo"),
    *(f"{_BLOCK}1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
TABLE, TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"

FAMILY = Family(
    name="T5",
    marker=r"encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(wi_0|wi_1|wo))",
    layers=tuple(Layer(name, ((Stored(name),),)) for name in LINEARS),
    plain=(Plain(TABLE_AGAIN, TABLE), Plain(TABLE, TABLE)),  # the later one is taken
    same=r"encoder\.(final_layer_norm|block\.\d+\.layer\.[01]\..+)\.weight",
    kind="text encoder",
)
