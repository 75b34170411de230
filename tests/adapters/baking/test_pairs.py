"""Pairs on their way into stored branches, against the matrices they stand for."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.adapters.baking.pairs import cut, scaled, stack, widen
from svdquant_nodes.svdquant.adapters.baking.places import Piece
from svdquant_nodes.svdquant.core.linear import Branch
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.tolerances import assert_close


def branch(rows, columns, strength=1.0, rank=3):
    down = layers.random(rank, columns.stop - columns.start, seed=1)
    return Branch(down, layers.random(rows.stop - rows.start, rank, seed=2), strength, rows, columns)


ROWS = [
    Piece(name, rows, slice(0, 8), 0, 0) for name, rows in (("qkv", slice(0, 12)), ("mlp", slice(12, 20)))
]
COLUMNS = [Piece(name, slice(0, 20), c, 0, 0) for name, c in (("out", slice(0, 3)), ("fc2", slice(3, 8)))]
BRANCHES = {
    "whole": (slice(0, 20), slice(0, 8)),
    "inside-the-first-rows": (slice(4, 8), slice(0, 8)),
    "across-the-rows": (slice(8, 16), slice(0, 8)),
    "inside-the-last-columns": (slice(0, 20), slice(4, 7)),
    "a-rectangle": (slice(10, 14), slice(2, 5)),
}


@pytest.mark.parametrize("pieces", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize(("rows", "columns"), BRANCHES.values(), ids=BRANCHES)
def test_what_is_cut_for_each_piece_is_the_whole_branch(pieces, rows, columns):
    found = branch(rows, columns, strength=-0.5)
    whole, parts = torch.zeros(20, 8).double(), torch.zeros(20, 8).double()
    whole[rows, columns] = -0.5 * found.up.double() @ found.down.double()
    for piece in pieces:
        pair = cut(found, piece)
        if pair is not None:
            parts[piece.rows, piece.columns] = pair[1].double() @ pair[0].double()
    assert_close(parts, whole, "fp32_sum")


def test_a_piece_beside_the_branch_gets_nothing():
    assert cut(branch(slice(0, 12), slice(0, 8)), ROWS[1]) is None
    assert cut(branch(slice(0, 20), slice(3, 8)), COLUMNS[0]) is None


def test_a_strength_is_rounded_once_and_one_changes_nothing():
    down = layers.random(2, 4, seed=1, dtype=torch.bfloat16)
    assert scaled(down, 1.0) is down
    assert torch.equal(scaled(down, 1.5), (down.double() * 1.5).bfloat16())


def test_pairs_of_one_down_become_one_where_their_rows_lie_apart():
    down, upper, lower = layers.random(2, 4, seed=1), torch.zeros(6, 2), torch.zeros(6, 2)
    upper[:3], lower[3:] = 1.0, 2.0
    [(shared, up)] = stack([(down, upper), (down, lower)])
    assert torch.equal(shared, down) and torch.equal(up, upper + lower)
    assert len(stack([(down, upper), (down + 1, lower)])) == 2
    assert len(stack([(down, upper), (down, upper)])) == 2  # a sum would be rounded


def test_a_wider_branch_is_both_beside_each_other():
    base = {"down": layers.random(2, 4, seed=1).bfloat16(), "up": layers.random(6, 2, seed=2).bfloat16()}
    more = [(layers.random(r, 4, seed=r), layers.random(6, r, seed=9 * r)) for r in (1, 3)]
    down, up = widen(base, more)
    want = base["up"].double() @ base["down"].double()
    want = want + sum(u.bfloat16().double() @ d.bfloat16().double() for d, u in more)
    assert down.dtype == up.dtype == torch.bfloat16
    assert_close(up.double() @ down.double(), want, "fp32_sum")
    assert all(torch.equal(a, b) for a, b in zip(widen(base, []), base.values(), strict=True))
