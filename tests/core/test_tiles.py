from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import tiles
from svdquant_nodes.svdquant.core.int4 import pack_nibbles
from svdquant_nodes.tests import golden, oracle

INT4 = [f"c{i}" for i in range(6)]
NVFP4 = ["f0", "f1", "f2"]
FILES = [("svdq_int4_linear", c) for c in INT4] + [("svdq_nvfp4_linear", c) for c in NVFP4]
IDS = [c for _, c in FILES]


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that -0, NaN and e4m3 compare too."""
    return t.contiguous().view(torch.uint8)


def assert_pair(tile, untile, natural, stored):
    """Both directions, to the bit, shape and dtype included."""
    got, back = tile(natural), untile(stored)
    assert got.shape == stored.shape and got.dtype == stored.dtype
    assert back.shape == natural.shape and back.dtype == natural.dtype
    assert torch.equal(bits(got), bits(stored)) and torch.equal(bits(back), bits(natural))


# ---- golden vectors: encode from the natural form with the padding of the format, decode back ----


@pytest.mark.parametrize("file, prefix", FILES, ids=IDS)
def test_golden_codes(file, prefix):
    t = golden.case(file, prefix)
    codes = t.get("logical.q", t.get("logical.code"))
    natural = pack_nibbles(tiles.pad_to(codes, (128, 128), 0))
    assert_pair(tiles.tile_codes, tiles.untile_codes, natural, t["packed.qweight"])


@pytest.mark.parametrize("prefix", INT4)
def test_golden_scales(prefix):
    t = golden.case("svdq_int4_linear", prefix)
    natural = tiles.pad_to(t["logical.scale"], (128, 2), 1)
    assert_pair(tiles.tile_scales, tiles.untile_scales, natural, t["packed.wscales"])


@pytest.mark.parametrize("prefix", NVFP4)
def test_golden_micro_scales(prefix):
    t = golden.case("svdq_nvfp4_linear", prefix)
    natural = tiles.pad_to(t["logical.subscale_e4m3"], (128, 4), 1)
    assert_pair(tiles.tile_micro_scales, tiles.untile_micro_scales, natural, t["packed.wscales"])


@pytest.mark.parametrize("file, prefix", FILES, ids=IDS)
def test_golden_branch(file, prefix):
    t = golden.case(file, prefix)
    down = tiles.pad_to(t["logical.lora_down"], (16, 128), 0)
    up = tiles.pad_to(t["logical.branch_b"], (128, 16), 0)
    assert_pair(tiles.tile_down, tiles.untile_down, down, t["packed.lora_down"])
    assert_pair(tiles.tile_up, tiles.untile_up, up, t["packed.lora_up"])


@pytest.mark.parametrize("file, prefix", FILES, ids=IDS)
def test_golden_vectors(file, prefix):
    t = golden.case(file, prefix)
    plain = {
        "bias": torch.zeros(128),
        "smooth": torch.ones(128),
    }  # what c4, that has neither, was written with
    fused = golden.parameters(file)[prefix].get("smooth_fused", False)
    for name in ("bias", "smooth"):
        natural = t.get(f"logical.{name}_final", t.get(f"logical.{name}"))
        if natural is None or (fused and name == "smooth"):
            natural = plain[name].to(t[f"packed.{name}"].dtype)
        natural = tiles.pad_to(natural, (128,), 1)
        assert_pair(tiles.tile_vector, tiles.untile_vector, natural, t[f"packed.{name}"])


def test_golden_second_scale_by_channel():
    t = golden.case("svdq_nvfp4_linear", "f1")
    assert_pair(tiles.tile_vector, tiles.untile_vector, t["logical.scale0"], t["packed.wcscales"])


@pytest.mark.parametrize("prefix", ["c1", "c3"])
def test_golden_kitchen_natural_and_tiled(prefix):
    t, logical = golden.case("kitchen", prefix), golden.case("svdq_int4_linear", f"{prefix}.logical")
    natural = pack_nibbles(logical["q"])
    assert torch.equal(natural.view(torch.int8), t["natural.weight"])
    assert torch.equal(logical["scale"].T, t["natural.weight_scale"])
    assert torch.equal(logical["lora_down"].T, t["natural.proj_down"])
    assert_pair(tiles.tile_kitchen_codes, tiles.untile_kitchen_codes, natural, t["tile.weight"])
    rows = tiles.tile_kitchen_rows, tiles.untile_kitchen_rows
    assert_pair(*rows, logical["scale"], t["tile.weight_scale"])
    assert_pair(*rows, logical["branch_b"], t["tile.proj_up"])


# ---- the index formulas, element by element, on numbers that are all different ----


def test_codes_follow_p1():
    codes = torch.randint(0, 16, (256, 128), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    stored = tiles.tile_codes(pack_nibbles(codes))
    assert bytes(bits(stored).flatten().tolist()) == oracle.store_nibbles(codes, oracle.p1)


def test_awq_codes_follow_p7():
    codes = torch.randint(0, 16, (8, 192), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    stored = tiles.tile_awq_codes(pack_nibbles(codes))
    assert stored.shape == (2, 192) and stored.dtype == torch.int16
    assert bytes(bits(stored).flatten().tolist()) == oracle.store_nibbles(codes, oracle.p7)
    assert torch.equal(tiles.untile_awq_codes(stored), pack_nibbles(codes))


@pytest.mark.parametrize("offset", range(4))
def test_codes_may_begin_at_any_byte_of_a_file(offset):
    natural = torch.randint(0, 256, (128, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    stored = tiles.tile_codes(natural)
    moved = torch.cat([torch.zeros(offset, dtype=torch.int8), stored.flatten()])[offset:].reshape(
        stored.shape
    )
    assert moved.storage_offset() == offset and torch.equal(tiles.untile_codes(moved), natural)


FORMULAS = {
    "p2": (tiles.tile_vector, oracle.p2, (384,)),
    "p3": (tiles.tile_scales, lambda n, g: oracle.p3(n, g, 6), (256, 6)),
    "p4": (tiles.tile_micro_scales, lambda n, g: oracle.p4(n, g, 8), (256, 8)),
    "p5": (tiles.tile_down, lambda r, c: oracle.p5(r, c, 48), (48, 128)),
    "p6": (tiles.tile_up, lambda c, r: oracle.p6(c, r, 48), (128, 48)),
    "kitchen-codes": (tiles.tile_kitchen_codes, lambda n, b: oracle.kitchen_codes(n, b, 64), (256, 64)),
    "kitchen-rows": (tiles.tile_kitchen_rows, lambda n, c: oracle.kitchen_rows(n, c, 5), (256, 5)),
}
INVERSES = {
    "p2": tiles.untile_vector,
    "p3": tiles.untile_scales,
    "p4": tiles.untile_micro_scales,
    "p5": tiles.untile_down,
    "p6": tiles.untile_up,
    "kitchen-codes": tiles.untile_kitchen_codes,
    "kitchen-rows": tiles.untile_kitchen_rows,
}


def numbered(name, shape):
    """Different numbers where the dtype has room for them, random bytes where it has not."""
    count = torch.Size(shape).numel()
    if name in ("p4", "kitchen-codes"):
        drawn = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
        return drawn.view(torch.float8_e4m3fn) if name == "p4" else drawn
    return torch.arange(count, dtype=torch.int32).reshape(shape)


@pytest.mark.parametrize("name", FORMULAS)
def test_orders_follow_their_formula(name):
    tile, place, shape = FORMULAS[name]
    natural = numbered(name, shape)
    stored = tile(natural)
    want = oracle.store(natural.view(torch.uint8) if name == "p4" else natural, place)
    assert torch.equal(bits(stored.flatten()), bits(want))
    assert torch.equal(bits(INVERSES[name](stored)), bits(natural))


# ---- probes: single elements whose place was worked out by hand ----


P1_PROBES = [
    ((0, 0), 0, 0),
    ((0, 1), 0, 1),
    ((0, 8), 16, 0),
    ((0, 32), 4, 0),
    ((1, 0), 64, 0),
    ((8, 0), 8, 0),
    ((16, 0), 512, 0),
    ((0, 64), 4096, 0),
    ((127, 63), 4095, 1),
    ((128, 0), 24576, 0),
]


@pytest.mark.parametrize("element, byte, half", P1_PROBES, ids=[str(p[0]) for p in P1_PROBES])
def test_p1_probe(element, byte, half):
    codes = torch.zeros(256, 384, dtype=torch.uint8)
    codes[element] = 15
    stored = bits(tiles.tile_codes(pack_nibbles(codes))).flatten()
    assert stored.nonzero().tolist() == [[byte]] and stored[byte] == 15 << (4 * half)


P4_PROBES = {(0, 0): 0, (0, 1): 1, (32, 0): 4, (8, 0): 16, (1, 0): 64, (7, 0): 448, (0, 4): 512}
DOWN_PROBES = {(0, 1): 1, (0, 2): 8, (0, 8): 2, (1, 0): 32, (8, 0): 4, (16, 0): 256, (0, 16): 512}
UP_PROBES = {**DOWN_PROBES, (16, 0): 512, (0, 16): 256}
PROBES = [
    *((tiles.tile_micro_scales, (128, 8), e, at) for e, at in P4_PROBES.items()),
    *((tiles.tile_down, (32, 32), e, at) for e, at in DOWN_PROBES.items()),
    *((tiles.tile_up, (32, 32), e, at) for e, at in UP_PROBES.items()),
]


@pytest.mark.parametrize("tile, shape, element, at", PROBES, ids=[f"{p[0].__name__}{p[2]}" for p in PROBES])
def test_probe(tile, shape, element, at):
    natural = torch.zeros(shape, dtype=torch.uint8)
    natural[element] = 1
    assert tile(natural).flatten().nonzero().tolist() == [[at]]


P7_PROBES = {
    (0, 1): (1, 0),
    (0, 8): (0, 1),
    (0, 32): (8, 0),
    (1, 0): (16, 0),
    (0, 64): (64, 0),
    (4, 0): (128, 0),
}


@pytest.mark.parametrize("element, place", P7_PROBES.items(), ids=[str(e) for e in P7_PROBES])
def test_p7_probe(element, place):
    codes = torch.zeros(8, 128, dtype=torch.uint8)
    codes[element] = 1
    stored = tiles.tile_awq_codes(pack_nibbles(codes)).flatten()
    assert stored.nonzero().tolist() == [[place[0]]] and stored[place[0]] == 1 << (4 * place[1])


def test_channel_order_inside_sixteen():
    stored = tiles.tile_vector(torch.arange(128))
    assert stored[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@pytest.mark.parametrize("chunks", [1, 3, 6])
def test_modulation_rows_are_interleaved_by_chunks(chunks):
    """Row j of chunk s is stored row j*S + s."""
    d = 5
    natural = torch.arange(chunks * d * 2).reshape(chunks * d, 2)
    stored = tiles.interleave(natural, chunks)
    for s in range(chunks):
        for j in range(d):
            assert torch.equal(stored[j * chunks + s], natural[s * d + j])
    assert torch.equal(stored[tiles.straight_order(chunks * d, chunks)], natural)


# ---- padding ----


def test_pad_to_fills_the_end_of_each_axis():
    assert tiles.pad_to(torch.zeros(1, 3, dtype=torch.int8), (2, 4), 1).tolist() == [
        [0, 0, 0, 1],
        [1, 1, 1, 1],
    ]


def test_pad_to_leaves_a_fitting_tensor_alone():
    x = torch.zeros(2, 4)
    assert tiles.pad_to(x, (2, 4), 1) is x


def test_pad_to_keeps_e4m3():
    x = torch.full((1, 1), 448.0).to(torch.float8_e4m3fn)
    padded = tiles.pad_to(x, (1, 2), 1)
    # e4m3 has a 1: byte 0x38
    assert padded.dtype == torch.float8_e4m3fn and bits(padded).tolist() == [[0x7E, 0x38]]


def test_orders_take_views():
    """A file hands out slices and transposes, not always contiguous tensors."""
    up = torch.arange(2 * 128 * 32).reshape(128, 64)[:, ::2]
    assert torch.equal(tiles.tile_up(up), tiles.tile_up(up.contiguous()))
    stored = tiles.tile_up(up)
    wide = torch.stack([stored, stored], dim=-1)[..., 0]
    assert not wide.is_contiguous() and torch.equal(tiles.untile_up(wide), up)
