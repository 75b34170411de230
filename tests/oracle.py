"""The op set once more, in float64 and from the definitions, to judge the code with.

Nothing here comes from the code under test: floats are rounded by their definition, codes are integers,
stored orders are index formulas for one element, walked by plain loops. Slow and obvious on purpose.

Values are numpy float64 arrays, codes are numpy int64 arrays; a dtype is named as in `FLOATS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

# significant bits, exponent of the smallest normal number, largest number, what lies beyond it
FLOATS = {
    "fp32": (24, -126, 3.4028234663852886e38, "inf"),
    "bf16": (8, -126, 3.3895313892515355e38, "inf"),
    "fp16": (11, -14, 65504.0, "inf"),
    "e4m3": (4, -6, 448.0, "saturate"),
    "e2m1": (2, 0, 6.0, "saturate"),
}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def values(t: torch.Tensor) -> np.ndarray:
    """A tensor's numbers as float64."""
    return t.detach().cpu().float().double().numpy() if t.dtype == torch.float8_e4m3fn else t.double().numpy()


def round_to(v: np.ndarray | float, name: str) -> np.ndarray:
    """The nearest number of a float format, ties to the even mantissa."""
    bits, emin, largest, beyond = FLOATS[name]
    v = np.asarray(v, dtype=np.float64)
    exponent = np.maximum(np.frexp(v)[1] - 1, emin)
    quantum = np.ldexp(1.0, exponent - bits + 1)
    rounded = np.rint(v / quantum) * quantum
    edge = np.inf if beyond == "inf" else largest
    return np.where(np.abs(rounded) > largest, np.copysign(edge, v), rounded)


# ---- activations ----


def smooth_act(x: np.ndarray, smooth: np.ndarray, dtype: str) -> np.ndarray:
    """One fp32 division, one rounding to the activations' dtype."""
    return round_to(round_to(x / smooth, "fp32"), dtype)


def _groups(k: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, k, size)]


def _integer_codes(
    xs: np.ndarray, size: int, q_max: int, low: int, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    m, k = xs.shape
    codes, scales = np.zeros((m, k), np.int64), np.zeros((m, k // size))
    inverse = round_to(1 / q_max, "fp32")
    for row in range(m):
        for g, columns in enumerate(_groups(k, size)):
            alpha = round_to(max(abs(v) for v in xs[row, columns]) * inverse, "fp32")
            scales[row, g] = round_to(alpha, dtype)
            if alpha > 0:
                quotient = np.rint(round_to(xs[row, columns] / alpha, "fp32"))
                codes[row, columns] = [min(max(int(q), low), q_max) for q in quotient]
    return codes, scales


def quantize_int4(x: np.ndarray, smooth: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [M, K] and stored scales [M, K/64]."""
    return _integer_codes(smooth_act(x, smooth, dtype), 64, 7, -8, dtype)


def quantize_int4_unsigned(
    x: np.ndarray, smooth: np.ndarray, shift: float, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0..15 [M, K] of x + shift, and stored scales [M, K/64]."""
    return _integer_codes(smooth_act(round_to(x + shift, dtype), smooth, dtype), 64, 15, 0, dtype)


def quantize_int8(
    x: np.ndarray, smooth: np.ndarray, shift: float, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Codes -127..127 [M, K] of x + shift, and fp32 scales [M, 1]: the whole row is one group."""
    xs = smooth_act(round_to(x + shift, dtype), smooth, dtype)
    return _integer_codes(xs, x.shape[1], 127, -127, "fp32")


def quantize_nvfp4(x: np.ndarray, smooth: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """e2m1 codes [M, K] (-0 kept) and e4m3 scales [M, K/16]."""
    xs = smooth_act(x, smooth, dtype)
    m, k = xs.shape
    codes, scales = np.zeros((m, k), np.int64), np.zeros((m, k // 16))
    for row in range(m):
        for g, columns in enumerate(_groups(k, 16)):
            absmax = max(abs(v) for v in xs[row, columns])
            alpha = min(round_to(absmax * round_to(1 / 6, "fp32"), "fp32"), 448.0)
            scales[row, g] = round_to(alpha, "e4m3")
            reciprocal = round_to(1 / alpha, "fp32") if alpha > 0 else 0.0
            for column in range(columns.start, columns.stop):
                codes[row, column] = e2m1_code(round_to(xs[row, column] * reciprocal, "fp32"))
    return codes, scales


def e2m1_code(v: float) -> int:
    """Round as the hardware does: nearest, ties to the even mantissa, the sign of zero kept."""
    return E2M1.index(abs(float(round_to(v, "e2m1")))) + (8 if np.signbit(v) else 0)


def e2m1_code_offline(v: float) -> int:
    """Round as the offline encoder does: nearest, ties to the smaller magnitude, never -0."""
    index = min(range(8), key=lambda i: (abs(abs(v) - E2M1[i]), i))
    return index + (8 if v < 0 and index else 0)


def e2m1_value(code: int) -> float:
    return -E2M1[code - 8] if code & 8 else E2M1[code]


# ---- weights ----


def nibbles(packed: torch.Tensor, *, signed: bool = False) -> np.ndarray:
    """Natural codes [N, K] of packed bytes [N, K/2], even column in the low half."""
    n, half = packed.shape
    out = np.zeros((n, half * 2), np.int64)
    for row, line in enumerate(packed.tolist()):
        for j, byte in enumerate(line):
            out[row, 2 * j : 2 * j + 2] = byte & 15, (byte >> 4) & 15
    return np.where(signed & (out > 7), out - 16, out)


def spread(scales: np.ndarray, k: int) -> np.ndarray:
    """Each group's number over its columns."""
    return np.array([[row[j * len(row) // k] for j in range(k)] for row in scales]).reshape(len(scales), k)


def weight_int4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return codes * spread(scales, codes.shape[1])


def weight_nvfp4(codes: np.ndarray, scales: np.ndarray, second: np.ndarray) -> np.ndarray:
    table = np.array([e2m1_value(c) for c in range(16)])
    return table[codes] * spread(scales, codes.shape[1]) * second.reshape(-1, 1)


def weight_awq(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    return codes * spread(scales, codes.shape[1]) + spread(zeros, codes.shape[1])


def weight_codes_int4(w: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Offline rounding: stored scale absmax / 7, codes half to even of the fp32 quotient."""
    n, k = w.shape
    codes, scales = np.zeros((n, k), np.int64), np.ones((n, k // 64))
    for row in range(n):
        for g, columns in enumerate(_groups(k, 64)):
            scale = float(round_to(round_to(np.abs(w[row, columns]).max() / 7, "fp32"), dtype))
            scales[row, g] = scale or 1.0
            codes[row, columns] = np.rint(round_to(w[row, columns] / scales[row, g], "fp32"))
    return codes.clip(-8, 7), scales


def act_values(codes: np.ndarray, scales: np.ndarray, *, e2m1: bool = False) -> np.ndarray:
    """What activation codes stand for: [M, K]."""
    table = np.array([e2m1_value(c) for c in range(16)])
    return (table[codes] if e2m1 else codes) * spread(scales, codes.shape[1])


def layer(x: np.ndarray, main: np.ndarray, down: np.ndarray, up: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Finish a W4A4 layer: 4-bit product given, branch on raw activations, bias."""
    return main + (x @ down.T) @ up.T + bias


# ---- stored orders: where one element goes ----


def p1(n: int, k: int, cols: int) -> int:
    """4-bit weight code [N, cols]: its nibble in the stored bytes."""
    nt, a, b, c = n // 128, n % 128 // 16, n % 16 // 8, n % 8
    kt, p, l, i = k // 64, k % 64 // 32, k % 32 // 8, k % 8
    word = ((((nt * (cols // 64) + kt) * 8 + a) * 8 + c) * 4 + l) * 4 + 2 * b + p
    return 8 * word + i


def p2(v: int) -> int:
    """Channel vector."""
    return 128 * (v // 128) + 16 * (v % 128 // 16) + 4 * (v % 8 // 2) + 2 * (v % 16 // 8) + v % 2


def p3(n: int, g: int, groups: int) -> int:
    """int4 group scale [N, groups]."""
    return (n // 128) * groups * 128 + g * 128 + p2(n) % 128


def p4(n: int, g: int, groups: int) -> int:
    """nvfp4 micro scale [N, groups]."""
    r = n % 128
    b, c, d = r // 32, r // 8 % 4, r % 8
    return (((n // 128) * (groups // 4) + g // 4) * 8 + d) * 64 + 16 * c + 4 * b + g % 4


def p5(r: int, c: int, rank: int) -> int:
    """Low-rank down [rank, C]."""
    rp, b, m = r // 16, r % 16 // 8, r % 8
    cp, p, l, e = c // 16, c % 16 // 8, c % 8 // 2, c % 2
    return (((cp * (rank // 16) + rp) * 8 + m) * 4 + l) * 8 + 4 * b + 2 * p + e


def p6(c: int, r: int, rank: int) -> int:
    """Low-rank up [C, rank]."""
    cp, b, m = c // 16, c % 16 // 8, c % 8
    rp, p, l, e = r // 16, r % 16 // 8, r % 8 // 2, r % 2
    return (((cp * (rank // 16) + rp) * 8 + m) * 4 + l) * 8 + 4 * b + 2 * p + e


def p7(n: int, k: int, cols: int) -> int:
    """AWQ code [N, cols]: its nibble in the stored bytes."""
    half_word = (n // 4) * cols + (k // 64) * 64 + (n % 4) * 16 + (k // 32 % 2) * 8 + k % 8
    return 4 * half_word + k // 8 % 4


def kitchen_codes(n: int, byte: int, half_cols: int) -> int:
    """Kitchen tile pack: natural byte [N, half_cols] to its place."""
    tile = (n // 128) * (half_cols // 32) + byte // 32
    return (tile * 32 + n % 128 // 4) * 128 + n % 4 * 32 + byte % 32


def kitchen_rows(n: int, c: int, cols: int) -> int:
    """Kitchen scales and proj_up: natural [N, cols] to its place."""
    return ((n // 128) * cols + c) * 128 + n % 128


def store(natural: torch.Tensor, place: Callable[..., int]) -> torch.Tensor:
    """Flat stored elements of a natural tensor; `place` gives every element's index."""
    if natural.ndim == 1:
        where = [place(v) for v in range(len(natural))]
    else:
        rows, cols = natural.shape
        where = [place(i, j) for i in range(rows) for j in range(cols)]
    flat = torch.empty(natural.numel(), dtype=natural.dtype)
    flat[torch.tensor(where)] = natural.flatten()
    return flat


def store_nibbles(codes: torch.Tensor, place: Callable[[int, int, int], int]) -> bytes:
    """Stored bytes of natural codes [N, K]; `place` gives every code's nibble."""
    n, k = codes.shape
    out = bytearray(n * k // 2)
    for i, line in enumerate(codes.tolist()):
        for j, code in enumerate(line):
            nibble = place(i, j, k)
            out[nibble // 2] |= (code & 15) << (4 * (nibble % 2))
    return bytes(out)
