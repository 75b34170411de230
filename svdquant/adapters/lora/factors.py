"""What a LoRA-like adapter adds to a weight, as low-rank branches: exact wherever its own structure is low-rank.

    LoRA, LoCon   up @ down                         rank r
    Tucker forms  of LoRA, LoHa and LoKr            rank r, the core multiplied into what reads the input
    LoHa          (B1 A1) * (B2 A2), element-wise   rank r1*r2: columns b1_i * b2_j, rows a1_i * a2_j
    LoKr          W1 (x) W2                         kept as the product it is: two small matrices, of any rank

What has no such form, or would be larger than the weight itself, is a dense difference (see truncation.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.linear import Branch

Members = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Factored:
    """A difference as branches, and what was lost on the way.

    branches  rows and columns count from the corner of the difference
    error     ||difference - branches|| / ||difference||, 0 where the branches are exact
    """

    branches: tuple[Branch, ...]
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Of the pairs; dense differences and Kronecker products count none."""
        return sum(branch.rank for branch in self.branches)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for branch in self.branches for t in branch.tensors)


# Tail of a Tucker core -> what it is multiplied into, and the other factor, which all but LoCon's keep transposed.
_CORES = {
    "lora_mid.weight": ("lora_down.weight", None),
    "hada_t1": ("hada_w1_b", "hada_w1_a"),
    "hada_t2": ("hada_w2_b", "hada_w2_a"),
    "lokr_t2": ("lokr_w2_b", "lokr_w2_a"),
}
_MATRICES = ("lora_", "hada_", "lokr_", "a1.", "a2.", "b1.", "b2.")  # how tails of factors begin


def plain(members: Members) -> Members:
    """The same adapter without Tucker cores [r, r, ...kernel]: the core times the factor that reads the input.

    Raises ValueError where they do not fit each other, or a factor is no matrix.
    """
    for tail, tensor in members.items():
        if tail.startswith(_MATRICES) and (tensor.ndim < 2 or not tensor.numel()):
            raise ValueError(f"{tail}: expected a matrix, got shape {list(tensor.shape)}")
    cores = members.keys() & _CORES.keys()
    if not cores:
        return members
    made = {tail: t for tail, t in members.items() if tail not in cores}
    for tail in cores:
        reads, writes = _CORES[tail]
        core, factor = members[tail].float(), members[reads].flatten(1).float()
        _fit(f"{tail} and {reads}", core.shape[:2], factor.shape[0])
        made[reads] = torch.einsum("ij...,jk->ik...", core, factor).flatten(1)
        if writes:
            made[writes] = members[writes].T
    return made


def size(members: Members) -> tuple[int, int] | None:
    """Rows and columns of the difference an adapter's tensors mean, None where the tensors do not say.

    Raises ValueError where its factors do not fit each other.
    """
    members = plain(members)
    if "lora_up.weight" in members:
        up, down = members["lora_up.weight"].flatten(1), members["lora_down.weight"].flatten(1)
        _fit("lora_up and lora_down", (up.shape[1],), down.shape[0])
        return up.shape[0], down.shape[1]
    if "hada_w1_a" in members:
        halves = [(members[f"hada_w{i}_a"], members[f"hada_w{i}_b"]) for i in (1, 2)]
        for up, down in halves:
            _fit("hada_w_a and hada_w_b", (up.shape[1],), down.shape[0])
        sizes = [(up.shape[0], down.flatten(1).shape[1]) for up, down in halves]
        _fit("the two halves of a LoHa", sizes[:1], sizes[1])
        return sizes[0]
    if "lokr_w1" in members or "lokr_w1_a" in members:
        (a, b), (c, d) = (_kron_size(members, f"lokr_w{i}") for i in (1, 2))
        return a * c, b * d
    diff = members.get("diff")
    return None if diff is None or diff.ndim < 2 else tuple(diff.flatten(1).shape)


def _kron_size(members: Members, name: str) -> tuple[int, int]:
    if name in members:
        return tuple(members[name].flatten(1).shape)
    up, down = members[f"{name}_a"], members[f"{name}_b"]
    _fit(f"{name}_a and {name}_b", (up.shape[1],), down.shape[0])
    return up.shape[0], down.flatten(1).shape[1]


def _fit(what: str, found: Sequence, expected) -> None:
    if any(x != expected for x in found):
        raise ValueError(f"{what}: expected them to share their inner size, got {found[0]} and {expected}.")


def factor(members: Members) -> Factored | None:
    """The exact branches of an adapter that does not depend on the weight, None where it has none worth keeping.

    members   tail -> tensor, as loaders.lora_names calls them; alpha included, `dora_scale` and the like not
    """
    members = plain(members)
    if "lora_up.weight" in members:
        return _lora(members)
    if "hada_w1_a" in members:
        return _loha(members)
    if "lokr_w1" in members or "lokr_w1_a" in members:
        return _lokr(members)
    return None


def dense(members: Members) -> Tensor | None:
    """The difference of an adapter that does not look at the weight: [n, k] fp32; None for those that do."""
    if "diff" in members:
        return members["diff"].flatten(1).float()
    members = plain(members)
    if "hada_w1_a" in members:
        halves = [
            members[f"hada_w{i}_a"].float() @ members[f"hada_w{i}_b"].flatten(1).float() for i in (1, 2)
        ]
        return halves[0] * halves[1] * alpha_over(members, members["hada_w1_b"].shape[0])
    found = factor(members)
    return None if found is None else found.branches[0].difference()


def planned(members: Members) -> int | None:
    """Bytes of the branches that `factor` would make, None where it would make none."""
    members = plain(members)
    if "hada_w1_a" in members:
        (n, k), rank = size(members), members["hada_w1_b"].shape[0] * members["hada_w2_b"].shape[0]
        return 4 * rank * (n + k) if rank <= largest_worth(n, k) else None
    low_rank = {"lora_up.weight", "lokr_w1", "lokr_w1_a"} & set(members)
    return sum(t.nbytes for t in members.values() if isinstance(t, Tensor)) if low_rank else None


def alpha_over(members: Members, rank: int) -> float:
    """alpha / rank, 1 where there is no alpha."""
    alpha = members.get("alpha")
    return 1.0 if alpha is None else float(alpha) / rank


def _lora(members: Members) -> Factored:
    up, down = members["lora_up.weight"].flatten(1), members["lora_down.weight"].flatten(1)
    return Factored((pair(down, up, alpha_over(members, down.shape[0])),))


def _loha(members: Members) -> Factored | None:
    (b1, a1), (b2, a2) = ((members[f"hada_w{i}_a"], members[f"hada_w{i}_b"].flatten(1)) for i in (1, 2))
    (n, k), rank = (b1.shape[0], a1.shape[1]), a1.shape[0] * a2.shape[0]
    if rank > largest_worth(n, k):
        return None
    up = (b1.float().unsqueeze(2) * b2.float().unsqueeze(1)).flatten(1)
    down = (a1.float().unsqueeze(1) * a2.float().unsqueeze(0)).flatten(0, 1)
    return Factored((pair(down, up, alpha_over(members, a1.shape[0])),))


def _lokr(members: Members) -> Factored:
    pairs = [members.get(f"lokr_w{i}_b") for i in (1, 2) if f"lokr_w{i}" not in members]
    scale = alpha_over(members, pairs[-1].shape[0]) if pairs else 1.0  # the whole form knows no alpha
    first = members.get("lokr_w1")
    if first is None:
        first = members["lokr_w1_a"].float() @ members["lokr_w1_b"].float()
    if "lokr_w2" in members:
        down, up = members["lokr_w2"].flatten(1), None
    else:
        down, up = members["lokr_w2_b"].flatten(1), members["lokr_w2_a"]
    n, k = size(members)
    return Factored((Branch(down, up, scale, slice(0, n), slice(0, k), first.flatten(1)),))


def glora(members: Members, weight: Tensor) -> Branch | None:
    """GLoRA as one pair, W + B + W A = W + [B1 | W A1] [B2 ; A2]; None where the tensors are not, or do not fit.

    weight   [n, k]   fp32   as patched so far
    returns           its `down` and `up` of twice the rank, fp32
    """
    found = None if "dora_scale" in members else glora_factors(members, tuple(weight.shape))
    if found is None:
        return None
    a1, a2, b1, b2 = (t.to(weight) for t in found)
    return pair(torch.cat((b2, a2)), torch.cat((b1, weight @ a1), 1), alpha_over(members, a2.shape[0]))


def glora_factors(members: Members, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """A1 [k, r], A2 [r, k], B1 [n, r], B2 [r, k] of a GLoRA; None where they are not, or do not fit [n, k].

    In the older form, told by its shapes, the factors are the other way round.
    """
    if "a1.weight" not in members:
        return None
    a1, a2, b1, b2 = (members[f"{n}.weight"].flatten(1) for n in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    n, k = shape
    if old and (not new or a2.shape[0] == n == k):
        a1, a2, b1, b2 = a2, a1, b2, b1
    elif not new:
        return None
    fit = (a1.shape[0], a2.shape[1], b1.shape[0], b2.shape[1]) == (k, k, n, k)
    return (a1, a2, b1, b2) if fit else None


def pair(down: Tensor, up: Tensor, scale: float = 1.0) -> Branch:
    """A branch of the whole difference: down [r, k], up [n, r]."""
    return Branch(down, up, scale, slice(0, up.shape[0]), slice(0, down.shape[1]))


def largest_worth(n: int, k: int) -> int:
    """The highest rank whose fp32 factors take less memory than a 16-bit weight."""
    return (n * k - 1) // (2 * (n + k))


def whole(delta: Tensor, dtype: torch.dtype) -> Factored:
    """A difference kept as it is: [n, k] fp32 -> one dense branch in `dtype`."""
    dense = Branch(delta.to(dtype), None, 1.0, slice(0, delta.shape[0]), slice(0, delta.shape[1]))
    return Factored((dense,))
