"""One adapter of a LoRA file as a pair of factors, which is all that a stored branch can hold.

LoRA, LoCon, LoHa   the pair that runs at run time, where its rank is one that a branch takes
LoKr                one pair, exact where the product's rank is one that a branch takes
GLoRA               one pair, with the weight in it
the others          (LoHa of higher rank, differences, DoRA, OFT, BOFT) the fewest ranks within an error, or none
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...core.linear import Branch
from ..lora import factors, rescaling
from ..lora.factors import Factored, Members
from ..lora.truncation import kron_pair, needed, truncated

MAX_RANK = 1024  # what the published engine's kernels take
_SEEING = {"dora_scale", "oft_blocks", "a1.weight"}  # tails of adapters that look at the weight


@dataclass(frozen=True)
class Target:
    """What an adapter is to become a part of.

    shape     rows and columns of the region it changes
    weight    makes the region's weight as the LoRAs before have left it, [n, k] fp32
    limit     largest relative error of what is not low-rank
    branch    whether the layer has a branch; a 16-bit layer takes any difference as it is
    """

    shape: tuple[int, int]
    weight: Callable[[], Tensor]
    limit: float
    branch: bool


def fit(members: Members, strength: float, target: Target) -> Factored:
    """One branch of the region that means what the adapter at a strength means, and its relative error.

    Raises ValueError where the adapter does not fit the region, or no branch can hold it; says what to do.
    """
    size = factors.size(members)
    if size is not None and size != target.shape:
        raise ValueError(
            f"expected {list(target.shape)}, got {list(size)}. Choose a LoRA made for this model."
        )
    found = _low_rank(members, strength, target)
    return found or _reduced(_difference(members, strength, target), target)


def _low_rank(members: Members, strength: float, target: Target) -> Factored | None:
    if "a1.weight" in members:
        branch = factors.glora(members, target.weight())
    elif _SEEING & set(members):
        return None
    else:
        found = factors.factor(members)
        branch = found.branches[0] if found else None
    if branch is None:
        return None
    branch = branch.scaled(strength)
    if branch.kron is not None and target.branch:
        return kron_pair(branch, target.limit, MAX_RANK) or _refuse(branch.difference(), target)
    return Factored((branch,))


def _difference(members: Members, strength: float, target: Target) -> Tensor:
    if _SEEING & set(members):
        delta = rescaling.difference(members, target.weight(), strength)
    else:
        delta = factors.dense(members)
        delta = None if delta is None else strength * delta
    if delta is None or delta.shape != target.shape:
        kind = ", ".join(sorted(set(members) - {"alpha"}))
        raise ValueError(
            f"expected an adapter that can be baked, got {kind}. Apply this LoRA at run time instead: "
            "SVDQuant Apply LoRA takes it as it is."
        )
    return delta


def _reduced(delta: Tensor, target: Target) -> Factored:
    if not target.branch:
        whole = Branch(delta, None, 1.0, slice(0, delta.shape[0]), slice(0, delta.shape[1]))
        return Factored((whole,))
    return truncated(delta, target.limit, MAX_RANK) or _refuse(delta, target)


def _refuse(delta: Tensor, target: Target) -> Factored:
    rank, error = needed(delta, target.limit, MAX_RANK)
    raise ValueError(
        f"expected a low-rank adapter, got one that a branch cannot hold: within {target.limit:.2%} of it only at "
        f"rank {rank}, and at {MAX_RANK}, the most there is, {error:.1%} off. Apply this LoRA at run time, "
        "or allow a larger error."
    )
