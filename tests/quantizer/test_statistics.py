"""What is kept of a run's inputs: a fair and bounded choice, extremes of all, calls set apart."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from svdquant_nodes.svdquant.quantizer.statistics import FIELDS, Reservoir, Statistics, load, save


def test_reservoir_is_bounded_and_even():
    kept = Reservoir(400, torch.Generator().manual_seed(0))
    for call in range(20):
        kept.add(torch.full((100, 1), float(call)))
    counts = torch.bincount(kept.rows.flatten().int(), minlength=20)
    assert len(kept.rows) == 400
    assert counts.min() >= 8  # 20 expected; a choice of the first or last calls would leave zeros
    assert counts.max() <= 36


def test_all_rows_of_a_short_run_are_kept():
    kept = Reservoir(50, torch.Generator().manual_seed(0))
    kept.add(torch.arange(30.0)[:, None])
    assert sorted(kept.rows.flatten().tolist()) == list(range(30))


def test_mean_and_extremes_are_of_every_token():
    seen, x = Statistics(tokens=16), torch.randn(40, 25, 8)
    for rows in x:
        seen.see("a", rows[None])
    sample = seen["a"]
    torch.testing.assert_close(sample.mean, x.mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert torch.equal(sample.low, x.amin((0, 1)))
    assert torch.equal(sample.high, x.amax((0, 1)))
    assert sample.rows.shape == (16, 8)


def test_no_token_is_both_seen_and_held_out():
    seen = Statistics(tokens=64)
    for call in range(40):
        seen.see("a", torch.full((10, 2), float(call)))
    sample = seen["a"]
    fit, held = (set(x[:, 0].tolist()) for x in (sample.rows, sample.held))
    assert held
    assert not fit & held


def test_one_call_is_split():
    seen = Statistics(tokens=64)
    seen.see("a", torch.arange(64.0).reshape(1, 64, 1))
    sample = seen["a"]
    assert len(sample.held) == 8
    assert not set(sample.held.flatten().tolist()) & set(sample.rows.flatten().tolist())


def test_same_seed_same_rows():
    def record(seed):
        seen = Statistics(tokens=8, seed=seed)
        for x in torch.randn(30, 20, 4, generator=torch.Generator().manual_seed(5)):
            seen.see("a", x)
        return seen["a"].rows

    assert torch.equal(record(1), record(1))
    assert not torch.equal(record(1), record(2))


def test_file_and_back(tmp_path):
    seen = Statistics(tokens=8)
    for x in torch.randn(4, 5, 16):
        seen.see("blocks.0.a", x)
        seen.see("blocks.0.b", x[:, :8])
    save(tmp_path / "stats.safetensors", seen)
    back = load(tmp_path / "stats.safetensors")
    assert set(back) == {"blocks.0.a", "blocks.0.b"}
    for field in FIELDS:
        assert torch.equal(getattr(back["blocks.0.b"], field), getattr(seen["blocks.0.b"], field))


def test_another_file_is_refused(tmp_path):
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: expected calibration statistics"):
        load(tmp_path / "other.safetensors")
