"""PSNR and SSIM agree with hand-made cases; panels show what they say."""

from __future__ import annotations

import importlib.machinery
import math
import sys
import types

import pytest
import torch

from svdquant_nodes.svdquant.quantizer.compare import ALEXNET, lpips, panel, psnr, ssim


def pictures(count=2):
    return torch.rand(count, 24, 32, 3)


def test_equal_pictures():
    a = pictures()
    assert torch.isinf(psnr(a, a)).all()
    assert ssim(a, a) == pytest.approx([1.0, 1.0])


def test_psnr_of_a_known_distance():
    a = pictures() * 0.8
    assert psnr(a + 0.1, a) == pytest.approx([20.0, 20.0], abs=1e-4)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = torch.full((1, 16, 16, 3), 0.5), torch.full((1, 16, 16, 3), 0.7)
    expected = (2 * 0.5 * 0.7 + 1e-4) / (0.25 + 0.49 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_ssim_falls_with_noise_and_is_symmetric():
    a, noise = pictures(1), torch.randn(1, 24, 32, 3)
    near, far = ((a + scale * noise).clamp(0, 1) for scale in (0.02, 0.2))
    assert ssim(far, a) < ssim(near, a) < 1
    assert ssim(a, far).item() == pytest.approx(ssim(far, a).item())


def test_each_picture_is_judged_by_itself():
    a = pictures(3)
    b = a.clone()
    b[1] = 1 - b[1]
    assert [math.isinf(x) for x in psnr(b, a).tolist()] == [True, False, True]


def test_panel_is_reference_image_difference():
    a, b = torch.full((1, 4, 5, 3), 0.5), torch.full((1, 4, 5, 3), 0.6)
    shown = panel(b, a)
    assert shown.shape == (1, 4, 15, 3)
    assert [round(v, 3) for v in shown[0, 0, ::5, 0].tolist()] == [0.5, 0.6, 0.7]


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="two batches .* of one size"):
        psnr(pictures(), pictures(1))


class Network:
    """Stands in for LPIPS: the mean of what it is given, where 16-bit pictures are black."""

    def __init__(self, net, verbose):
        assert (net, verbose) == ("alex", False)

    def __call__(self, a, b):
        assert a.shape[1] == 3 and float(b.min()) == float(b.max()) == -1.0
        return a.mean((1, 2, 3), keepdim=True)


def test_lpips_is_asked_only_where_package_and_weights_are(tmp_path, monkeypatch):
    a, b = torch.full((2, 8, 8, 3), 0.75), torch.zeros(2, 8, 8, 3)
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert lpips(a, b) is None
    package = types.ModuleType("lpips")
    package.LPIPS = Network
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    assert lpips(a, b) is None  # no weights, and none are fetched
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ALEXNET).touch()
    assert lpips(a, b).tolist() == [0.5, 0.5]
