"""NVRTC makes every kernel for every card, under its C++ name and without spills. Needs no GPU, no nvcc and no g++.

In CI all of one card, and of the others what is written for them alone.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path

import pytest

from svdquant_nodes.svdquant.kernels import cubins, launches, nvrtc

CARDS = ("75", "80", "86", "89", "90a", "100a", "120a")
IN_CI = {  # card -> headers, or kernels
    "75": ("gemm_int4",),
    "86": (".*",),
    "90a": ("hopper_.*",),
    "100a": ("gemm_int4",),  # three blocks an SM: the fewest registers
    "120a": ("gemm_mxf4", ".*Mxf4Loop.*"),
}


def library() -> Path | None:
    """As a user's machine has it, or from the package nvidia-cuda-nvrtc without a torch for CUDA."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations or ()) if spec else ()
    found = [file for place in places for file in Path(place).glob("*/lib/libnvrtc.so.*")]
    return cubins.library() or next(iter(sorted(found)), None)


pytestmark = pytest.mark.skipif(library() is None, reason="NVRTC is missing: pip install nvidia-cuda-nvrtc")


def number(card: str) -> int:
    return int(card.rstrip("a"))


def in_ci(unit: cubins.Unit, card: str) -> bool:
    names = (unit.header, *unit.names)
    return any(re.fullmatch(wanted, name) for wanted in IN_CI.get(card, ()) for name in names)


UNITS = [
    pytest.param(unit, card, id=name, marks=pytest.mark.xdist_group(name))
    for card in CARDS
    for i, unit in enumerate(cubins.units(number(card)))
    for name in (f"{unit.header}-{i}-sm_{card}",)
    if os.environ.get("CI") != "true" or in_ci(unit, card)
]


@functools.cache
def compiler() -> nvrtc.Nvrtc:
    return nvrtc.Nvrtc(library())


@pytest.mark.parametrize(("unit", "card"), UNITS)
def test_compiles_without_spills(unit, card):
    program = nvrtc.Program(compiler(), unit.source, cubins.headers(), unit.names)
    try:
        program.compile([*cubins.OPTIONS, f"-arch=sm_{card}", "--ptxas-options=-v"])
    except nvrtc.Failed:
        pytest.fail(program.words(), pytrace=False)
    spills = re.findall(r"(\d+) bytes spill stores, \d+ bytes spill loads", program.words())
    assert list(map(int, spills)) == [0] * len(unit.names)
    code = program.cubin()
    assert all(found.encode() in code for found in program.kernels().values())
    assert list(program.kernels()) == list(unit.names)


def test_every_kernel_is_in_a_unit():
    for card in map(number, CARDS):
        names = [name for unit in cubins.units(card) for name in unit.names]
        assert sorted(names) == sorted(kernel.name for kernel in launches.kernels(card))
        assert len(set(names)) == len(names)


def test_a_card_that_it_does_not_know_is_said(tmp_path):
    unit = cubins.units(86)[0]
    with pytest.raises(cubins.Unavailable, match=r"NVRTC \d+\.\d+ does not know sm_999") as caught:
        cubins._compile(unit, "999", library(), tmp_path / "0.cubin")
    assert "as new as the GPU" in caught.value.remedy


def test_what_is_wrong_in_a_source_is_said(tmp_path):
    wrong = cubins.Unit("gemm_w8a8", ("no_such_kernel<1>",))
    with pytest.raises(cubins.Unavailable, match="NVRTC failed .*no_such_kernel"):
        cubins._compile(wrong, "86", library(), tmp_path / "0.cubin")
