"""Two runs that make the same file: the second is refused, and the first does not notice."""

from __future__ import annotations

import pytest

from svdquant_nodes.svdquant.quantizer.alone import alone
from svdquant_nodes.tests.quantizer import tiny
from svdquant_nodes.tests.quantizer.test_stream import quantize, svdquant


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny.safetensors", tiny.flux())


def test_one_at_a_time_and_nothing_is_left(tmp_path):
    target = tmp_path / "out.safetensors"
    refused = pytest.raises(
        ValueError, match=r"^out\.safetensors: expected no other run that makes this file"
    )
    with alone(target), refused, alone(target):
        pass
    with alone(target), alone(tmp_path / "other.safetensors"):  # another file is another matter
        pass
    with alone(target):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_a_killed_run_left_holds_nobody_up(tmp_path):
    (tmp_path / ".out.safetensors.lock").touch()
    with alone(tmp_path / "out.safetensors"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_refused_and_the_first_one_finishes(source, tmp_path):
    target, refused = tmp_path / "out.safetensors", []

    def second(name, done, total, error):
        if done == 3:
            refused.append(svdquant(source, target, "--rank", "0", "--quiet"))

    quantize(source, target, progress=second)
    assert refused[0].returncode == 2 and "got one at work. Wait for it" in refused[0].stderr
    quantize(source, tmp_path / "whole.safetensors")
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
