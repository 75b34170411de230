"""A LoRA as the Nunchaku engine keeps it: layer by layer, with the base model's branch inside.

    X.lora_down  [K, R]   order P5   rows of D = [D0 ; A], padded to a rank of 16
    X.lora_up    [N, R]   order P6   columns of U = [U0 | B]

Such a file replaces a model's branch and belongs to the one checkpoint it was made on. With that checkpoint's own
D0 and U0 at hand, what is left of R is the LoRA. Modulation layers have no branch: their pairs are plain row-major
and hold the LoRA alone, with the rows of `lora_up` in the engine's interleaved order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..svdquant.core import tiles

ENDS = {".lora_down": "down", ".lora_up": "up"}

Pair = tuple[Tensor, Tensor]  # down [r, K], up [N, r]


def detect(names: Iterable[str]) -> bool:
    """Whether any tensor is called `X.lora_down`: every other naming says `.weight` or an underscore after it."""
    return any(name.endswith(".lora_down") for name in names)


def group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The stored pairs by layer, and the tensors that belong to none.

    Raises ValueError for half a pair, or two factors that do not share their rank.
    """
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, dot, tail = name.rpartition(".")
        if dot + tail in ENDS:
            found.setdefault(layer, {})[ENDS[dot + tail]] = tensor
        else:
            rest[name] = tensor
    for layer, pair in found.items():
        if set(pair) != {"down", "up"}:
            raise ValueError(
                f"{layer}: expected lora_down and lora_up, got only lora_{next(iter(pair))}. The file is incomplete."
            )
        ranks = [pair[end].shape[-1] for end in ("down", "up")]
        if pair["down"].ndim != 2 or pair["up"].ndim != 2 or not _agree(pair):
            raise ValueError(f"{layer}: expected two factors of one rank, got {ranks}. The file is damaged.")
    return {layer: (pair["down"], pair["up"]) for layer, pair in found.items()}, rest


def _agree(pair: Mapping[str, Tensor]) -> bool:
    """Packed pairs keep the rank last in both; plain ones keep it first in `down`."""
    return pair["up"].shape[1] in pair["down"].shape


def extract(stored: Pair, base: Pair, first: int = 0) -> Pair | None:
    """The LoRA in a packed pair; None where the pair was not made on this base.

    stored    down [K', R], up [N', R]   packed
    base      down [R0, K], up [n, R0]   natural, padding cropped; `up` from row `first` of the stored linear on
    returns   down [r, K], up [n, r]     zero ranks dropped; r may be 0
    """
    (d0, u0), (k, n) = base, (base[0].shape[1], base[1].shape[0])
    rank, r0 = stored[0].shape[1], -(-d0.shape[0] // tiles.TILE_R) * tiles.TILE_R
    fits = all(x % tiles.TILE_R == 0 for x in (*stored[0].shape, *stored[1].shape))
    if not fits or rank < r0 or stored[1].shape[1] != rank:
        return None
    down, up = tiles.untile_down(stored[0])[:, :k], tiles.untile_up(stored[1])[first : first + n]
    if down.shape[1] < k or up.shape[0] < n:
        return None
    d0, u0 = (x.to(down.dtype) for x in (d0, u0))
    same = torch.equal(down[: d0.shape[0]], d0) and torch.equal(up[:, : u0.shape[1]], u0)
    return _without_zeros(down[r0:], up[:, r0:]) if same else None


def plain(stored: Pair, splits: int) -> Pair:
    """The pair of a modulation layer in the model's own row order: stored row j*S + s is row s*d + j."""
    down, up = stored
    return _without_zeros(down, up[tiles.straight_order(up.shape[0], splits)])


def _without_zeros(down: Tensor, up: Tensor) -> Pair:
    used = (down != 0).any(1) & (up != 0).any(0)
    return down[used], up[:, used]
