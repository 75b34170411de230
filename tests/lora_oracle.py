"""What each kind of LoRA adds to a weight, in float64 and from its published definition, apart from the code.

LoRA 2106.09685, LoHa 2108.06098, LoKr 2212.10650 and 2309.14859, GLoRA 2306.07967, DoRA 2402.09353, OFT 2306.07280,
BOFT 2311.06243.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _f64(members: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.to(torch.float64).numpy() for name, t in members.items()}


def low_rank(members: dict[str, Tensor]) -> np.ndarray:
    """The difference of an adapter that does not look at the weight, alpha included."""
    m = _f64(members)
    if "diff" in m:
        return m["diff"]
    if "lora_up.weight" in m:
        up, down = m["lora_up.weight"], m["lora_down.weight"]
        middle = m.get("lora_mid.weight", np.eye(len(down)))
        return up @ middle.reshape(middle.shape[:2]) @ down * _scale(m, len(down))
    if "hada_w1_a" in m:
        halves = [_product(m, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
        return halves[0] * halves[1] * _scale(m, len(m["hada_w1_b"]))
    factors, rank = [], None
    for i in (1, 2):
        if f"lokr_w{i}" in m:
            factors.append(m[f"lokr_w{i}"])
        else:
            factors.append(_product(m, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}"))
            rank = len(m[f"lokr_w{i}_b"])
    return np.kron(*factors) * (1.0 if rank is None else _scale(m, rank))


def _product(m: dict[str, np.ndarray], first: str, second: str, core: str) -> np.ndarray:
    """Of two factors, or of three in a Tucker form on a 1x1 kernel, which keeps the first transposed."""
    if core not in m:
        return m[first] @ m[second]
    return np.einsum("ip,ij,jr->pr", m[first], m[core].reshape(m[core].shape[:2]), m[second])


def difference(members: dict[str, Tensor], weight: np.ndarray, strength: float) -> np.ndarray:
    """What an adapter at a strength adds to a weight [n, k]."""
    m = _f64(members)
    if "a1.weight" in m and "dora_scale" not in m:
        a1, a2, b1, b2 = (m[name] for name in ("a1.weight", "a2.weight", "b1.weight", "b2.weight"))
        return strength * (b1 @ b2 + weight @ a1 @ a2) * _scale(m, len(a2))
    if "oft_blocks" in m and m["oft_blocks"].ndim == 4:
        return strength * _butterfly(
            m, weight, strength
        )  # the turns are blended, and their outcome: as ComfyUI does
    if "oft_blocks" in m:
        return _rotation(m["oft_blocks"], weight, float(m.get("alpha", 0.0))) * strength**2  # as ComfyUI does
    if "dora_scale" not in m:
        return strength * low_rank(members)
    plain = difference({name: t for name, t in members.items() if name != "dora_scale"}, weight, 1.0)
    # As ComfyUI does: by rows, the norm that divides is the one before training; by columns, the one after; an epsilon.
    magnitude, direction = m["dora_scale"], weight + plain
    by_rows = len(magnitude) == len(weight)
    norm = np.linalg.norm(weight if by_rows else direction, axis=1 if by_rows else 0, keepdims=True)
    norm = norm + np.finfo(np.float32).eps
    return strength * (direction * (magnitude.reshape(norm.shape) / norm) - weight)


def _scale(m: dict[str, np.ndarray], rank: int) -> float:
    return float(m["alpha"]) / rank if "alpha" in m else 1.0


def _rotation(blocks: np.ndarray, weight: np.ndarray, most: float) -> np.ndarray:
    """Cayley's orthogonal matrices, block by block down the rows; `most` bounds how far they may turn."""
    count, size, _ = blocks.shape
    skew = blocks - blocks.transpose(0, 2, 1)
    norm = np.linalg.norm(skew) + 1e-8
    if most > 0 and norm > most:
        skew = skew * most / norm
    out = np.empty_like(weight)
    for i in range(count):
        rows = slice(i * size, (i + 1) * size)
        turn = (np.eye(size) + skew[i]) @ np.linalg.inv(np.eye(size) - skew[i])
        out[rows] = turn.T @ weight[rows] - weight[rows]
    return out


def _butterfly(m: dict[str, np.ndarray], weight: np.ndarray, strength: float) -> np.ndarray:
    """The product of sparse n x n matrices, written out entry by entry."""
    stages, count, size, _ = m["oft_blocks"].shape
    skew = m["oft_blocks"] - m["oft_blocks"].transpose(0, 1, 3, 2)
    most, norm = float(m.get("alpha", 0.0)), np.linalg.norm(skew) + 1e-8
    skew = skew * most / norm if 0 < most < norm else skew
    out, half = weight, size // 2
    for i in range(stages):
        whole, apart = np.zeros((len(weight), len(weight))), 2**i * half
        for block in range(count):
            turn = (np.eye(size) + skew[i, block]) @ np.linalg.inv(np.eye(size) - skew[i, block])
            # row 2 j + s of the block is row first + j of its half s; the halves lie `apart` rows apart
            first = block * half // apart * 2 * apart + block * half % apart
            rows = [first + j + s * apart for j in range(half) for s in (0, 1)]
            whole[np.ix_(rows, rows)] = strength * turn + (1 - strength) * np.eye(size)
        out = whole @ out
    return out * m.get("rescale", 1.0) - weight
