"""Natural order <-> the tile orders found on disk, each with its inverse.

The Nunchaku orders P1..P7 are tensor-core fragment orders: P1 follows the B fragment of m16n8k64, P5 and P6 that of
m16n8k16. Stored shapes are nominal there; only element counts mean something. Every pair below is one einops pattern
read left to right (tile) and right to left (natural).

Letters: nt, kt count tiles of N and K; the other letters are the axes inside a tile.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

TILE_N = 128  # rows of a Nunchaku tile; N, K and channel vectors are padded to it
TILE_R = 16  # ranks are padded to it

_P1 = "(nt a b c) (kt p l) -> nt kt a c l b p", dict(a=8, b=2, c=8, p=2, l=4)  # of words of 8 codes
_P2 = "(nt a b c d) -> nt a c b d", dict(a=8, b=2, c=4, d=2)
_P3 = "(nt a b c d) g -> nt g a c b d", dict(a=8, b=2, c=4, d=2)
_P4 = "(nt b c d) (g e) -> nt g d c b e", dict(b=4, c=4, d=8, e=4)
_P5 = "(rp b m) (cp p l e) -> cp rp m l b p e", dict(b=2, m=8, p=2, l=4, e=2)
_P6 = "(cp b m) (rp p l e) -> cp rp m l b p e", dict(b=2, m=8, p=2, l=4, e=2)
_P7 = "(nt r) (kt h j l) -> nt kt r h l j", dict(r=4, h=2, j=2, l=2)  # of words, see tile_awq_codes
_KITCHEN_WEIGHT = "(nt a b) (kt c) -> nt kt a (b c)", dict(a=32, b=4, c=32)
_KITCHEN_ROWS = "(nt n) r -> nt r n", dict(n=128)


def _tile(x: Tensor, order: tuple[str, dict[str, int]]) -> Tensor:
    pattern, sizes = order
    return rearrange(x, pattern, **sizes).contiguous()


def _natural(flat: Tensor, order: tuple[str, dict[str, int]], **outer: int) -> Tensor:
    """Undo `_tile` on a tensor of any shape; `outer` gives the tile counts that its size alone does not tell."""
    pattern, sizes = order
    left, right = pattern.split(" -> ")
    letters = right.replace("(", "").replace(")", "").split()
    axes = {**sizes, **outer}
    shape = [axes.get(letter, -1) for letter in letters]
    return rearrange(flat.reshape(shape), f"{' '.join(letters)} -> {left}", **sizes).contiguous()


def pad_to(x: Tensor, multiples: tuple[int, ...], fill: float) -> Tensor:
    """Pad every axis at its end to a multiple: [a, b] with multiples (m, n) -> [ceil(a/m)*m, ceil(b/n)*n]."""
    widths: list[int] = []
    for size, multiple in zip(reversed(x.shape), reversed(multiples), strict=True):
        widths += [0, -size % multiple]
    if not any(widths):
        return x
    if x.dtype == torch.float8_e4m3fn:  # no pad kernel for it
        return pad(x.float(), widths, value=fill).to(x.dtype)
    return pad(x, widths, value=fill)


def _words(x: Tensor) -> Tensor:
    """Bytes seen as int32 words: [..., 4n] -> [..., n]. Copies only what lies unaligned in its file."""
    aligned = (
        x
        if x.is_contiguous() and x.storage_offset() % 4 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )
    return aligned.view(torch.int32)


def tile_codes(packed: Tensor) -> Tensor:
    """P1, 4-bit weight codes: natural [N, K/2] uint8 -> stored [N, K/2] int8. N, K multiples of 128, 64."""
    return _tile(_words(packed), _P1).view(torch.int8).reshape(packed.shape)


def untile_codes(stored: Tensor) -> Tensor:
    """P1 back: stored [N, K/2] int8 -> natural [N, K/2] uint8."""
    n, half = stored.shape
    return _natural(_words(stored), _P1, nt=n // TILE_N, kt=half // 32).view(torch.uint8)


def tile_vector(x: Tensor) -> Tensor:
    """P2, channel vectors (bias, smooth, wcscales): [L] -> [L], L a multiple of 128."""
    return _tile(x, _P2).reshape(-1)


def untile_vector(stored: Tensor) -> Tensor:
    """P2 back: [L] -> [L]."""
    return _natural(stored, _P2)


def tile_scales(scales: Tensor) -> Tensor:
    """P3, int4 group scales: natural [N, G] -> stored [G, N]."""
    return _tile(scales, _P3).reshape(scales.shape[1], scales.shape[0])


def untile_scales(stored: Tensor) -> Tensor:
    """P3 back: stored [G, N] -> natural [N, G]."""
    return _natural(stored, _P3, g=stored.shape[0])


def tile_micro_scales(scales: Tensor) -> Tensor:
    """P4, nvfp4 group scales: natural [N, G] e4m3 -> stored [G, N], G a multiple of 4."""
    stored = _tile(scales.view(torch.uint8), _P4).reshape(scales.shape[1], scales.shape[0])
    return stored.view(scales.dtype)


def untile_micro_scales(stored: Tensor) -> Tensor:
    """P4 back: stored [G, N] -> natural [N, G]."""
    return _natural(stored.view(torch.uint8), _P4, g=stored.shape[0] // 4).view(stored.dtype)


def tile_down(down: Tensor) -> Tensor:
    """P5, low-rank down: natural [R, K] -> stored [K, R], both multiples of 16."""
    return _tile(down, _P5).reshape(down.shape[1], down.shape[0])


def untile_down(stored: Tensor) -> Tensor:
    """P5 back: stored [K, R] -> natural [R, K]."""
    return _natural(stored, _P5, cp=stored.shape[0] // 16, rp=stored.shape[1] // 16)


def tile_up(up: Tensor) -> Tensor:
    """P6, low-rank up: natural [N, R] -> stored [N, R], both multiples of 16."""
    return _tile(up, _P6).reshape(up.shape)


def untile_up(stored: Tensor) -> Tensor:
    """P6 back: stored [N, R] -> natural [N, R]."""
    return _natural(stored, _P6, cp=stored.shape[0] // 16, rp=stored.shape[1] // 16)


def _exchange(low: Tensor, high: Tensor, bits: int, mask: int) -> tuple[Tensor, Tensor]:
    """Swap the fields of `low` that lie `bits` above `mask` with the fields of `high` under `mask`."""
    changed = (low >> bits).bitwise_xor_(high).bitwise_and_(mask)
    return low ^ (changed << bits), changed.bitwise_xor_(high)


def _pair_columns(word: Tensor) -> Tensor:
    """Swap nibbles 1, 3 of a word with its nibbles 4, 6: columns k and k + 1 come into one byte. Its own inverse."""
    changed = (word >> 4).bitwise_xor_(word >> 16).bitwise_and_(0x0F0F)
    return (changed << 4).bitwise_xor_(changed << 16).bitwise_xor_(word)


def _transpose_bytes(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The 4x4 transpose of the bytes of four words, in exchanges of bytes, then of halves. Its own inverse."""
    a, b, c, d = words
    (a, b), (c, d) = _exchange(a, b, 8, 0x00FF00FF), _exchange(c, d, 8, 0x00FF00FF)
    (a, c), (b, d) = _exchange(a, c, 16, 0xFFFF), _exchange(b, d, 16, 0xFFFF)
    return a, b, c, d


def tile_awq_codes(packed: Tensor) -> Tensor:
    """P7, AWQ codes, four rows interleaved: natural [N, K/2] uint8 -> stored int16 [N/4, K].

    P7 keeps columns k, k+8, k+16, k+24 in one int16: in every 32 columns, an 8x4 transpose of nibbles.
    """
    n, half = packed.shape
    words = _tile(_words(packed), _P7).reshape(-1, 4).T.contiguous().unbind()
    stored = torch.stack([_pair_columns(word) for word in _transpose_bytes(words)], dim=-1)
    return stored.view(torch.int16).reshape(n // 4, half * 2)


def untile_awq_codes(stored: Tensor) -> Tensor:
    """P7 back: stored int16 [N/4, K] or int32 [N/4, K/2] -> natural [N, K/2] uint8."""
    bytes_ = stored.contiguous().view(torch.uint8)
    nt, kt = bytes_.shape[0], bytes_.shape[1] // 128
    planes = _words(bytes_).reshape(-1, 4).T.contiguous()
    words = tuple(_pair_columns(word) for word in planes)
    return _natural(torch.stack(_transpose_bytes(words), dim=-1), _P7, nt=nt, kt=kt).view(torch.uint8)


def interleave(x: Tensor, chunks: int) -> Tensor:
    """A modulation's rows as the engine stores them: row s*d + j of chunks of d rows -> row j*chunks + s, [N, ...]."""
    return rearrange(x, "(s j) ... -> (j s) ...", s=chunks).contiguous()


def straight_order(rows: int, chunks: int) -> Tensor:
    """Back: the stored rows in the model's own order, as an index [N]."""
    return rearrange(torch.arange(rows), "(j s) -> (s j)", s=chunks)


def tile_kitchen_codes(packed: Tensor) -> Tensor:
    """Kitchen tile pack: natural [N, K/2] uint8 -> stored int8 [N/128, K/64, 32, 128]."""
    return _tile(packed, _KITCHEN_WEIGHT).view(torch.int8)


def untile_kitchen_codes(stored: Tensor) -> Tensor:
    """Kitchen tile pack back: int8 [N/128, K/64, 32, 128] -> natural [N, K/2] uint8."""
    nt, kt = stored.shape[:2]
    return _natural(stored.view(torch.uint8), _KITCHEN_WEIGHT, nt=nt, kt=kt)


def tile_kitchen_rows(x: Tensor) -> Tensor:
    """Kitchen scales and proj_up: natural [N, C] -> stored [N/128, C, 128]."""
    return _tile(x, _KITCHEN_ROWS)


def untile_kitchen_rows(stored: Tensor) -> Tensor:
    """Kitchen scales and proj_up back: [N/128, C, 128] -> natural [N, C]."""
    return _natural(stored, _KITCHEN_ROWS, nt=stored.shape[0], r=stored.shape[1])
