"""The two ways to a GPU's kernels: which is taken, what is said when one or both fail, and what a driver refuses."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svdquant_nodes.svdquant.kernels import cuda, driver, gpu, jit, launches, select
from svdquant_nodes.svdquant.kernels.cache import Unavailable
from svdquant_nodes.svdquant.kernels.settings import settings
from svdquant_nodes.svdquant.kernels.starts import Matrix
from svdquant_nodes.tests.kernels.fake_driver import STREAM, EmulatedMap, Functions, card, compiled
from svdquant_nodes.tools.pack import ROOT

ADA = ((8, 9),)
NO_COMPILER = Unavailable("no C++ compiler named cl was found", "Install one.")
NO_NVRTC = Unavailable("no NVRTC for CUDA 13.0", "Install it.")


@pytest.fixture
def ways(monkeypatch, caplog):
    """What comes of each way and what the environment says; a problem is raised. Loads afresh."""
    caplog.set_level(logging.INFO, logger="svdquant-nodes")

    def set_(compiler, nvrtc, build="auto", kernels="auto"):
        def way(outcome):
            def load(index, capabilities):
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

            return load

        both = way(compiler), way(nvrtc)
        monkeypatch.setattr(cuda, "WAYS", {"auto": both, "cpp": both[:1], "nvrtc": both[1:]})
        monkeypatch.setattr(cuda, "settings", lambda: replace(settings(), build=build, kernels=kernels))
        cuda._load_once.cache_clear()
        return cuda.load(0, ADA)

    yield set_
    cuda._load_once.cache_clear()


LIBRARY, ARCHIVE = cuda.Found(Path("kernels.so")), cuda.Found(Path("kernels.zip"), by_nvrtc=True)


def test_a_compiler_goes_first(ways, caplog):
    assert ways(LIBRARY, ARCHIVE) == LIBRARY and not caplog.records


def test_without_a_compiler_nvrtc_builds_and_says_why(ways, caplog):
    assert ways(NO_COMPILER, ARCHIVE) == ARCHIVE
    said = (
        "SVDQuant: GPU kernels are built without a C++ compiler, by NVRTC: no C++ compiler named cl was found"
    )
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", said)]


def test_with_neither_plain_torch_runs_and_one_sentence_says_so(ways, caplog):
    found = ways(NO_COMPILER, NO_NVRTC)
    assert found.missing == "no C++ compiler named cl was found; no NVRTC for CUDA 13.0"
    assert found.file == jit.library_path(jit.cuda_target(*ADA)) and not found.by_nvrtc
    cuda.load(0, ADA)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert caplog.records[0].getMessage().endswith(f"runs instead: {found.missing}. Install it.")


def test_one_way_by_name(ways):
    assert ways(NO_COMPILER, ARCHIVE, "cpp").missing == NO_COMPILER.reason
    assert ways(LIBRARY, ARCHIVE, "cpp") == LIBRARY
    assert ways(LIBRARY, ARCHIVE, "nvrtc") == ARCHIVE
    assert ways(LIBRARY, NO_NVRTC, "nvrtc").missing == NO_NVRTC.reason


def test_an_unknown_way_is_said(ways, caplog):
    assert ways(LIBRARY, ARCHIVE, "cmake").missing == "SVDQUANT_BUILD is 'cmake'"
    assert "Set it to one of auto, cpp, nvrtc, then restart." in caplog.text


def test_off_tries_nothing(ways, caplog):
    assert ways(ValueError("called"), ARCHIVE, kernels="off").missing == "SVDQUANT_KERNELS is off"
    assert not caplog.records


def test_a_library_is_tried_once_for_all_gpus(monkeypatch):
    tried = []

    def attempt(target):
        tried.append(target)
        raise NO_COMPILER

    monkeypatch.setattr(jit, "attempt", attempt)
    cuda._attempt.cache_clear()
    for index in range(2):
        with pytest.raises(Unavailable):
            cuda._by_compiler(index, ((7, 5), (8, 9)))
    cuda._attempt.cache_clear()
    assert [target.name for target in tried] == ["cuda-sm_75-sm_89"]


# ---- what is chosen ----


def test_the_choice_says_how_it_was_built():
    hopper = select.Device("cuda", capability=(9, 0), by_nvrtc=True)
    int4 = select.Request("gemm_int4", "bfloat16")
    assert select.choose(hopper, int4).sentence() == "wgmma_e4m3_x4 (built without a C++ compiler)"
    turing = select.choose(replace(hopper, capability=(7, 5)), int4)
    assert turing.sentence().startswith(
        "mma_sm75 (built without a C++ compiler; not wgmma_e4m3_x4: wgmma needs"
    )


def test_a_gpu_is_tried_as_it_was_built(monkeypatch, tmp_path):
    """The verdict lies beside the archive, and the device knows which way it came."""
    archive = cuda.Found(tmp_path / "svdquant-nvrtc-sm_89-0.zip", by_nvrtc=True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=8, minor=9, name="RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(cuda, "load", lambda index, capabilities: archive)
    monkeypatch.setattr(gpu, "judge", lambda index: gpu.Verdict({"mma_s4": "gemm_int4 is off by 3"}))
    found = gpu.find()
    assert found.by_nvrtc and found.distrusted == {"mma_s4"} and not found.missing
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith("svdquant-nvrtc-sm_89-0-RTX-4090-") and kept.suffix == ".json"


def test_of_several_gpus_each_is_told_for_itself(monkeypatch):
    """One library is built for those that our kernels fit; with SVDQUANT_KERNELS off none of them is tried."""
    cards = [
        SimpleNamespace(major=6, minor=1, name="GTX 1080"),
        SimpleNamespace(major=8, minor=9, name="RTX 4090"),
    ]
    built, judged = [], []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(cuda, "load", lambda *asked: built.append(asked) or LIBRARY)
    monkeypatch.setattr(gpu, "trusted", lambda found, *_: judged.append(found.capability) or found)
    assert gpu.find(0).missing == select.unfit((6, 1), "GTX 1080") and built == judged == []
    assert gpu.find(1).capability == (8, 9) and built == [(1, ADA)] and judged == [(8, 9)]
    monkeypatch.setattr(gpu, "settings", lambda: replace(settings(), kernels="off"))
    assert gpu.find(1).capability == (8, 9) and judged == [(8, 9)]


# ---- the driver ----


def test_launches_go_to_the_current_stream_in_the_cards_context():
    functions = Functions()
    here = card(89, functions)
    functions.called.clear()
    gemv = next(kernel for kernel in launches.kernels(89) if kernel.header == "gemv_awq")
    here.launch(launches.Start(gemv, (3, 2), launches.Gemv()))
    assert functions.launched == [(gemv.name, (3, 2), 256, 4096, STREAM)]
    assert functions.called == ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]


def test_a_context_is_left_after_an_error_too():
    functions = Functions(fails={"cuLaunchKernel": 1})
    here, gemv = card(89, functions), next(launches.kernels(89))
    with pytest.raises(driver.DriverError, match="^cuLaunchKernel: invalid argument$"):
        here.launch(launches.Start(gemv, (1, 1), launches.Gemm()))
    assert functions._contexts == []


def test_more_shared_memory_than_usual_is_asked_for():
    functions = Functions()
    here = driver.Card(driver.Driver(functions), 0, 80, stream=lambda: STREAM)
    large = launches.Kernel("gemm", "large_kernel", 128, 64 * 1024)
    here.load(compiled([large]), [large])
    assert functions.called.count("cuFuncSetAttribute") == 1
    assert "cuFuncSetAttribute" not in [name for f in [Functions()] if card(80, f) for name in f.called]


MAP = Matrix(0x10000, rows=300, columns=192, row_bytes=192, box_rows=128, box_columns=128)
BAD_MAPS = {
    "address": dict(data=0x10008),
    "rows-apart": dict(row_bytes=200),
    "rows-over-each-other": dict(row_bytes=176),
    "no-rows": dict(rows=0),
    "box-too-high": dict(box_rows=257),
    "box-of-no-pieces": dict(box_columns=120),
    "box-too-wide-to-be-swizzled": dict(box_columns=256),
}


def test_the_copy_engine_is_told_about_a_matrix():
    here = card(90, Functions())
    told = EmulatedMap.from_buffer_copy(here.encode(MAP))
    assert (told.data, told.rows, told.columns, told.row_bytes) == (0x10000, 300, 192, 192)
    assert (told.box_rows, told.box_columns, told.element_bytes, told.swizzled) == (128, 128, 1, True)
    scales = replace(MAP, row_bytes=1216, columns=300, rows=3, box_rows=2, element_bytes=4)
    assert not EmulatedMap.from_buffer_copy(here.encode(scales)).swizzled


@pytest.mark.parametrize("change", BAD_MAPS.values(), ids=BAD_MAPS)
def test_what_the_copy_engine_cannot_read_is_refused(change):
    functions = Functions()
    with pytest.raises(driver.DriverError, match="^cuTensorMapEncodeTiled: invalid argument$"):
        card(90, functions).encode(replace(MAP, **change))
    assert functions._contexts == []


def test_a_driver_without_the_copy_engine_is_said():
    class Old(Functions):
        def __getattr__(self, name):
            if name == "cuTensorMapEncodeTiled":
                raise AttributeError(name)
            return super().__getattr__(name)

    with pytest.raises(driver.DriverError, match="the driver has no cuTensorMapEncodeTiled"):
        card(90, Old()).encode(MAP)


def test_clusters_are_counted_once():
    functions = Functions(multiprocessors=7)
    here = card(90, functions)
    alone, pair = (next(k for k in launches.kernels(90) if k.cluster == blocks) for blocks in (1, 2))
    assert [here.clusters_at_once(kernel) for kernel in (alone, pair, pair)] == [7, 4, 4]
    assert functions.called.count("cuOccupancyMaxActiveClusters") == 1


def test_clusters_are_estimated_where_the_driver_cannot_say():
    """As in C++: a launch is none the worse for it, and says itself what is wrong."""
    functions = Functions(multiprocessors=7, fails={"cuOccupancyMaxActiveClusters": 1})
    here = card(90, functions)
    pair, four = (next(k for k in launches.kernels(90) if k.cluster == blocks) for blocks in (2, 4))
    assert [here.clusters_at_once(kernel) for kernel in (pair, four, pair)] == [4, 2, 4]
    assert functions.called.count("cuOccupancyMaxActiveClusters") == 2 and functions._contexts == []


def test_a_kernel_of_another_card_is_refused():
    floats = launches.MXF4.large.kernel
    with pytest.raises(driver.DriverError, match="gemm_mxf4_kernel<LargeTile> is not for this card"):
        card(89, Functions()).launch(launches.Start(floats, (1, 1), launches.Gemm()))


DRIVERS = {
    "too-old": ({"cuModuleLoadData": 209}, r"\(cuModuleLoadData: no kernel image is available for execution"),
    "no-such-kernel": ({"cuModuleGetFunction": 500}, r"\(cuModuleGetFunction: error 500\)"),
    "no-context": ({"cuDevicePrimaryCtxRetain": 1}, r"\(cuDevicePrimaryCtxRetain: invalid argument\)"),
}


@pytest.mark.parametrize(("fails", "message"), DRIVERS.values(), ids=DRIVERS)
def test_what_a_driver_refuses_is_one_sentence(monkeypatch, fails, message):
    properties = SimpleNamespace(major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(cuda, "_driver", lambda: driver.Driver(Functions(fails=fails)))
    monkeypatch.setattr(cuda.cubins, "load", lambda target: compiled(launches.kernels(target.number)))
    cuda.card.cache_clear()
    with pytest.raises(Unavailable, match=f"the driver does not take the kernels {message}") as caught:
        cuda.card(0)
    assert caught.value.remedy == "Update NVIDIA's driver, then restart."


def test_no_driver_is_one_sentence(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "no-such-driver.so")
    with pytest.raises(Unavailable, match="the CUDA driver cannot be used .*no-such-driver.so"):
        driver.open_driver()


def test_every_op_is_registered_for_gpus_once():
    code = """
import sys, types
for name in ("first", "second"):
    module = types.ModuleType(name); module.__path__ = [sys.argv[1]]; sys.modules[name] = module
import torch
from first.svdquant.kernels import cuda_ops as a, ops
from second.svdquant.kernels import cuda_ops as b
ops.declare()
print(len(a._registered))
a.register(lambda index: None); a.register(lambda index: None); b.register(lambda index: None)
here = torch._C._dispatch_has_kernel_for_dispatch_key
print(all(here(f"svdquant::{name}", "CUDA") for name in a.OPS), len(a._registered), len(b._registered))
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "True", "1", "0"], done.stderr
