"""One linear, two conventions: what the SVDQuant engine stores, and what the model's own module computes.

The engine fuses work around three kinds of layers, and its files hold them as that needs: rows of modulations are
interleaved by chunks and their scale rows have a 1 added, and int4 linears after a GELU get activations without a
sign. Files that a model's own modules run, ComfyUI's or diffusers', hold those layers as they are.
"""

from __future__ import annotations

from dataclasses import replace

from ..core import reference
from ..core.tiles import straight_order
from ..core.weights import GELU_SHIFT, INT4, LinearWeights

# The others (kitchen, nunchaku_lite) follow the model's own; natural files are written from the engine's.
ENGINE_DIALECTS = ("nunchaku_v1", "nunchaku_v2", "nunchaku_folder", "natural")


def straighten(weights: LinearWeights, splits: int) -> LinearWeights:
    """A modulation linear in the model's own order: rows un-interleaved, the folded +1 taken out of the bias.

    Stored row j*S + s is row s*d + j; scale chunks are s = 1 and, for S = 6, s = 4. The bias comes back in fp32,
    because 16 bits cannot hold every (b + 1) - 1. Raises ValueError where there is none, or rows of an odd chunk.
    """
    if weights.bias is None or weights.out_features % splits:
        found = "no bias" if weights.bias is None else f"{weights.out_features} rows"
        raise ValueError(
            f"modulation: expected a bias and rows for {splits} chunks, got {found}. "
            "The file is damaged; download it again."
        )
    straight = weights.rows(straight_order(weights.out_features, splits))
    bias = straight.bias.float().reshape(splits, -1).clone()
    bias[1::3] -= 1
    return replace(straight, bias=bias.reshape(-1))


def interleave(weights: LinearWeights, splits: int) -> LinearWeights:
    """The inverse of `straighten`; the bias goes back to the dtype of the scales."""
    bias = weights.bias.float().reshape(splits, -1).clone()
    bias[1::3] += 1
    folded = replace(weights, bias=bias.reshape(-1).to(weights.scales.dtype))
    return folded.rows(straight_order(weights.out_features, splits).argsort())


def unsign(weights: LinearWeights) -> LinearWeights:
    """A signed int4 linear for activations shifted by GELU_SHIFT: the bias takes out what the shift puts in."""
    shifted = replace(weights, spec=replace(weights.spec, act_shift=GELU_SHIFT))
    offset = reference.shift_compensation(shifted)
    bias = -offset if weights.bias is None else weights.bias.float() - offset
    return replace(shifted, bias=bias.to(weights.smooth.dtype))


def holds_shift(weights: LinearWeights) -> bool:
    """Whether a layer's bias takes out a shift of GELU_SHIFT, as `unsign` makes it; the file does not say.

    The model's own bias knows nothing of the rows' sums, so the least-squares slope of the stored one on them is near
    0 or near 1. A few hundred rows tell.
    """
    if weights.bias is None:
        return False
    few = weights.rows(slice(0, 512))
    offset = reference.residual(few).sum(-1) * -GELU_SHIFT
    offset, bias = offset - offset.mean(), few.bias.float() - few.bias.float().mean()
    return bool(offset @ bias > 0.5 * (offset @ offset))


def to_engine(weights: LinearWeights, splits: int, act_shift: float) -> LinearWeights:
    """A linear of the model's own convention as the engine wants it in a place with these roles."""
    if splits and weights.spec.format == "awq":
        return interleave(weights, splits)
    if act_shift and weights.spec == INT4:
        return unsign(weights)
    return weights
