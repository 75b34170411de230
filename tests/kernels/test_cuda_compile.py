"""Every .cu compiles for every card, without spills where speed is made, to the tensor-core instruction it is for."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from svdquant_nodes.svdquant.kernels import jit

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
CARDS = ("75", "80", "86", "89", "90a", "100a", "120a")
NARROW = ("80", "86", "89")  # with products of 4-bit integers
HOPPER = ("90a",)
FLOATS = ("120a",)  # with products of 4-bit floats and their scales


def on(cards: tuple[str, ...], *instructions: str) -> dict[str, set[str]]:
    return {card: set(instructions) for card in cards}


# What the kernels of a file are made for, by card. Those by 4-bit integers are empty where such products are emulated.
TURING, EVERYWHERE_ELSE = CARDS[:1], CARDS[1:]
HALVES = on(EVERYWHERE_ELSE, "HMMA.16816.F32", "HMMA.16816.F32.BF16") | on(TURING, "HMMA.1688.F32")
INSTRUCTIONS = {
    "gemm_int4.cu": on(CARDS)
    | on(NARROW, "IMMA.16864.S4.S4", "IMMA.16864.U4.S4")
    | on(TURING, "IMMA.8832.S4.S4", "IMMA.8832.U4.S4"),
    "gemm_int4_wide.cu": on(EVERYWHERE_ELSE, "IMMA.16832.S8.S8") | on(TURING, "IMMA.8816.S8.S8"),
    "gemm_int4_gelu.cu": on(CARDS)
    | on(NARROW, "IMMA.16864.S4.S4", "HMMA.16816.F32", "HMMA.16816.F32.BF16")
    | on(TURING, "IMMA.8832.S4.S4", "HMMA.1688.F32"),
    "gemm_int4_gelu_wide.cu": on(EVERYWHERE_ELSE, "IMMA.16832.S8.S8", "HMMA.16816.F32", "HMMA.16816.F32.BF16")
    | on(TURING, "IMMA.8816.S8.S8", "HMMA.1688.F32"),
    "gemm_nvfp4_gelu.cu": on(EVERYWHERE_ELSE, "HMMA.16816.F32", "HMMA.16816.F32.BF16")
    | on(TURING, "HMMA.1688.F32"),
    "gemm_mxf4_gelu.cu": on(CARDS)
    | on(FLOATS, "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", "HMMA.16816.F32", "HMMA.16816.F32.BF16"),
    "gemm_w8a8.cu": on(EVERYWHERE_ELSE, "IMMA.16832.S8.S8") | on(TURING, "IMMA.8816.S8.S8"),
    "gemm_nvfp4.cu": on(EVERYWHERE_ELSE, "HMMA.16816.F32") | on(TURING, "HMMA.1688.F32"),
    "gemm_mxf4.cu": on(CARDS) | on(FLOATS, "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"),
    "quantize_int.cu": HALVES,
    "quantize_int8.cu": HALVES,
    "quantize_e4m3.cu": on(CARDS) | on(HOPPER, "HMMA.16816.F32", "HMMA.16816.F32.BF16"),
    "quantize_nvfp4.cu": HALVES,
    "gemv_awq.cu": on(CARDS),
    "hopper_w8a8.cu": on(CARDS) | on(HOPPER, *(f"IGMMA.64x{n}x32.S8.S8" for n in (256, 192, 128, 96))),
    "hopper_w4a4.cu": on(CARDS) | on(HOPPER, "QGMMA.64x128x32.F32.E4M3.E4M3", "HGMMA.64x128x16.F32.BF16"),
    "entry.cu": on(CARDS),
}
# What a product that ends as a quantizer may call: the rare cases of a division, and a shuffle in a warp that had them.
QUANTIZING = {"__cuda_sm3x_div_rn_noftz_f32_slowpath", "__cuda_sm70_shflsync_bfly_p"}
UNITS = [
    pytest.param(source, card, id=name, marks=pytest.mark.xdist_group(name))
    for source in INSTRUCTIONS
    for card in CARDS
    for name in (f"{source}-sm_{card}",)
]


def nvcc() -> Path | None:
    home = jit.cuda_home()
    found = home and shutil.which("nvcc", path=home / "bin")
    return Path(found) if found else None


def nvdisasm() -> str | None:
    """From the toolkit, or from the wheels that carry it: nvidia-cuda-nvdisasm, triton."""
    folders = [home / "bin" for home in [jit.cuda_home()] if home]
    for package, inner in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        folders += [Path(place) / inner for place in (spec.submodule_search_locations or ())] if spec else []
    return shutil.which("nvdisasm", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is missing: nothing can be compiled for a GPU")


@dataclass(frozen=True)
class Compiled:
    ptxas: str  # what it says about registers and spills
    sass: str | None  # None without nvdisasm


@functools.cache
def compiled(source: str, card: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [
            nvcc(),
            "-std=c++17",
            "-cubin",
            f"-arch=sm_{card}",
            "-Xptxas",
            "-v",
            CUDA / source,
            "-o",
            cubin,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(done.stderr, pytrace=False)
        tool = nvdisasm()
        sass = (
            subprocess.run([tool, cubin], capture_output=True, text=True, check=True).stdout if tool else None
        )
        return Compiled(done.stderr, sass)


@pytest.mark.parametrize(("source", "card"), UNITS)
def test_compiles_without_spills(source, card):
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled(source, card).ptxas)
    assert spills or source == "entry.cu"
    assert {int(bytes_) for pair in spills for bytes_ in pair} <= {0}


@pytest.mark.parametrize(("source", "card"), UNITS)
def test_tensor_core_instruction(source, card):
    """And no subroutine among the products, which is what an instruction that a card lacks becomes."""
    sass = compiled(source, card).sass
    if sass is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    products = set(re.findall(r"\b[A-Z]*MMA\.[A-Z0-9.x]+", sass))
    expected = INSTRUCTIONS[source][card]
    assert expected <= products if expected else not products
    if "gelu" in source:
        assert set(re.findall(r"\$(__cuda_\w+)", sass)) <= QUANTIZING
    elif source.startswith(("gemm", "hopper")):
        assert not re.search(r"\bRET\b", sass)


def test_every_source_is_in_the_table():
    assert {file.name for file in CUDA.glob("*.cu")} == INSTRUCTIONS.keys()


@pytest.mark.parametrize("source", [name for name in INSTRUCTIONS if name.startswith("hopper")])
def test_hopper_is_used(source):
    """The copy engine, to one block and to several; registers shared out between warps; arrivals at other blocks'
    barriers; and products that the compiler does not wait for."""
    made = compiled(source, *HOPPER)
    assert not re.search(
        r"\(C75\d\d\)", made.ptxas
    )  # its words on serialized products and ignored setmaxnreg
    if made.sass is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    there = set(made.sass.split())
    assert {"UTMALDG.2D", "USETMAXREG.TRY_ALLOC.CTAPOOL", "USETMAXREG.DEALLOC.CTAPOOL"} <= there
    if kernels_in_clusters(made.sass):
        assert {
            "UTMALDG.2D.MULTICAST",
            "SYNCS.ARRIVE.TRANS64.RED.A1T0",
            "UCGABAR_ARV",
            "UCGABAR_WAIT",
        } <= there


@pytest.mark.parametrize("source", [name for name in INSTRUCTIONS if name.startswith("hopper")])
def test_registers_that_warps_hand_on(source):
    """A block begins with what its warpgroups share out later, or those that ask for more wait for ever; and none
    touches a register that it has given back."""
    made = compiled(source, *HOPPER)
    if made.sass is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    share = r"USETMAXREG\.\S+ (?:UP\d, )?(0x[0-9a-f]+) (.*?)(?=USETMAXREG|\Z)"
    found = {name: re.findall(share, code, re.DOTALL) for name, code in kernels(made.sass)}
    assert any(found.values())
    for name, parts in found.items():
        counts = [int(count, 16) for count, _ in parts]
        at_start = re.search(rf"Function properties for {name}\n.*\n.*Used (\d+) registers", made.ptxas)[1]
        assert not counts or min(counts) + 2 * max(counts) <= 3 * int(at_start)  # one gives, two take
        for count, (_, code) in zip(counts, parts, strict=True):
            assert max(map(int, re.findall(r"\bR(\d+)\b", code))) < count


def kernels(sass: str) -> list[tuple[str, str]]:
    """Name and code of each."""
    return re.findall(r"\.section\s+\.text\.(\w+),(.*?)(?=\n\s*\.section|\Z)", sass, re.DOTALL)


@pytest.mark.parametrize("source", [name for name in INSTRUCTIONS if name.startswith("hopper")])
def test_no_thread_waits_for_the_memory_of_the_card(source):
    """But when blocks of a cluster meet, before the first tile and after the last: not once a step."""
    sass = compiled(source, *HOPPER).sass
    if sass is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    assert sass.count("MEMBAR.ALL.GPU") == sass.count("UCGABAR_ARV") == 2 * kernels_in_clusters(sass)


def kernels_in_clusters(sass: str) -> int:
    """Kernels of which several blocks are a cluster, by what the driver is told of each."""
    sizes = re.findall(r"EIATTR_CTA_PER_CLUSTER.*?\.word\s+(0x[0-9a-f]+)", sass, re.DOTALL)
    return sum(int(size, 16) > 1 for size in sizes)
