"""Values are on the grid that files hold, and scales are chosen as they say."""

from __future__ import annotations

import pytest
import torch

from svdquant_nodes.svdquant.core import fp4, int4
from svdquant_nodes.svdquant.core.weights import INT4, NVFP4
from svdquant_nodes.svdquant.quantizer.rounding import nearest, pack_codes, scales_absmax, scales_mse, snap

SPECS = pytest.mark.parametrize("spec", [INT4, NVFP4], ids=lambda spec: spec.format)
METHODS = pytest.mark.parametrize("method", [scales_absmax, scales_mse], ids=lambda m: m.__name__)


def decoded(packed, grid):
    if grid.spec.format == "int4":
        return int4.dequantize_weight(packed, grid.scales)
    return fp4.dequantize_weight(packed, grid.scales, grid.second)


@SPECS
@METHODS
def test_packed_codes_decode_to_the_values(spec, method):
    w = torch.randn(64, 256) * torch.randn(64, 1).exp()
    grid = method(w, spec)
    values = nearest(w, grid)
    torch.testing.assert_close(decoded(pack_codes(values, grid), grid), values, rtol=2e-7, atol=0)


@SPECS
def test_absmax_is_what_core_packs(spec):
    w = torch.randn(32, 128)
    grid = scales_absmax(w, spec)
    if spec.format == "int4":
        packed, scales = int4.quantize_weight(w, torch.bfloat16)
        assert torch.equal(scales, grid.scales)
        assert torch.equal(packed, pack_codes(nearest(w, grid), grid))
    else:
        largest = w.unflatten(-1, (-1, 16)).abs().amax(-1)
        step = grid.scales.float() * grid.second.float()
        assert (step * 6 / largest - 1).abs().max() <= 1 / 16  # e4m3 keeps three bits


@SPECS
def test_tried_scales_never_leave_more_error_than_absmax(spec):
    w = torch.randn(64, 256).pow(3)

    def errors(grid):
        return (nearest(w, grid) - w).square().unflatten(-1, (-1, spec.group)).sum(-1)

    tried, plain = errors(scales_mse(w, spec)), errors(scales_absmax(w, spec))
    assert bool((tried <= plain * (1 + 1e-6)).all())
    assert tried.sum() < 0.95 * plain.sum()


def test_importance_moves_the_error_to_columns_that_do_not_matter():
    w, importance = torch.randn(64, 128).pow(3), torch.ones(128)
    importance[::2] = 100.0

    def error(grid):
        return ((nearest(w, grid) - w).square() * importance).sum()

    assert error(scales_mse(w, INT4, importance)) < error(scales_mse(w, INT4))


def test_the_largest_value_may_take_code_minus_eight():
    w = torch.ones(1, 64)
    w[0, 5] = 8.0  # -8 with a negative scale: everything is exact
    grid = scales_mse(w, INT4)
    assert grid.scales.item() < 0
    assert int4.unpack_signed(pack_codes(nearest(w, grid), grid))[0, 5] == -8
    assert nearest(w, grid)[0, 5] == 8.0


@SPECS
def test_a_zero_weight_stays_zero(spec):
    grid = scales_mse(torch.zeros(4, 64), spec)
    assert torch.equal(nearest(torch.zeros(4, 64), grid), torch.zeros(4, 64))
    assert bool(torch.isfinite(grid.scales.float()).all())


@SPECS
def test_snap_takes_the_nearest_code(spec):
    x = torch.cat((torch.linspace(-9, 9, 4001), torch.randn(4000) * 3))
    grid = torch.arange(-8.0, 8) if spec.format == "int4" else fp4.decode(torch.arange(16, dtype=torch.uint8))
    nearest_there_is = (x[:, None] - grid).abs().amin(1)
    assert torch.equal((x - snap(x, spec)).abs(), nearest_there_is)
    assert set(snap(x, spec).tolist()) <= set(grid.tolist())
