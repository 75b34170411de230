"""Whether a GPU's kernels are trusted: what a trial says, and what follows when it crashes, hangs or cannot run."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.svdquant.kernels import gpu, ops, select, selftest, trial
from svdquant_nodes.svdquant.kernels.driver import Driver
from svdquant_nodes.tests.kernels.fake_driver import Functions

HOPPER = select.Device("cuda", capability=(9, 0))
DONE = {"done": ""}
PYTHON = gpu.sources(gpu.HERE)


def script(monkeypatch, *trials):
    """What trials say and how they end, one after the other; returns what each was told to skip."""
    skipped, left = [], list(trials)

    def run(index, skip):
        skipped.append(set(skip))
        return left.pop(0)

    monkeypatch.setattr(gpu, "_run_trial", run)
    return skipped


def test_all_is_well(monkeypatch):
    script(monkeypatch, ([{"trying": "mma_s4"}, {"trying": "gemv"}, DONE], ""))
    assert gpu.judge(0) == gpu.Verdict({})


def test_a_trial_finds_the_memory_that_torch_holds_without_using_it(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(gpu, "_run_trial", lambda *_: done.append("tried") or ([DONE], ""))
    gpu.judge(0)
    assert done == ["emptied", "tried"]


def test_a_wrong_spelling_is_left_out_and_the_next_one_is_tried(monkeypatch):
    said = [{"trying": "mma_s4"}, {"fault": "gemm_int4 is off by 3"}, {"trying": "gemv"}, DONE]
    script(monkeypatch, (said, ""))
    assert gpu.judge(0).faults == {"mma_s4": "gemm_int4 is off by 3"}


def test_a_crash_is_the_fault_of_what_ran(monkeypatch):
    crash = ([{"trying": "gemv"}, {"trying": "wgmma_sm90"}], "its process ended with code -6: no word")
    skipped = script(monkeypatch, crash, ([{"trying": "gemv"}, DONE], ""))
    assert gpu.judge(0) == gpu.Verdict({"wgmma_sm90": crash[1]}, deadly=("wgmma_sm90",))
    assert skipped == [set(), {"wgmma_sm90"}]


def test_a_fault_that_the_process_does_not_survive_is_told_by_its_own_words(monkeypatch):
    words = (
        [{"trying": "gemv"}, {"fault": "gemv_awq: CUDA error"}],
        "its process ended with code 1: CUDA error",
    )
    script(monkeypatch, words, ([DONE], ""))
    assert gpu.judge(0) == gpu.Verdict({"gemv": "gemv_awq: CUDA error"}, deadly=("gemv",))


@pytest.mark.parametrize("words", [[], [{"trying": "gemv"}]], ids=["at-the-start", "again-in-the-same-place"])
def test_a_trial_that_gets_nowhere_ends(monkeypatch, words):
    script(monkeypatch, *[(words, "its process ended with code 1: no driver")] * 2)
    assert gpu.judge(0).untried == "they could not be tried: its process ended with code 1: no driver"


# ---- the process ----


def test_a_hang_ends_with_what_was_said_before(monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout, output=b'noise\n{"trying": "wgmma_sm90"}\n{"tr')

    monkeypatch.setattr(subprocess, "run", hang)
    assert gpu._run_trial(0, ()) == ([{"trying": "wgmma_sm90"}], "it did not end within 90 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the trial would find nothing wrong")
def test_the_process_starts_and_its_last_word_is_told():
    said, ending = gpu._run_trial(0, ("mma_s8",))
    assert said == []
    assert ending == "its process ended with code 1: torch finds no NVIDIA GPU"


CUDA_ERROR = """Traceback (most recent call last):
  File "<string>", line 1, in <module>
torch.AcceleratorError: CUDA error: unspecified launch failure
Search for `cudaErrorLaunchFailure' in NVIDIA's pages for more information.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.

"""


def test_the_words_of_a_crash_are_the_errors_and_not_the_advice_behind_it(monkeypatch):
    ended = SimpleNamespace(returncode=1, stdout='{"trying": "gemv"}\n', stderr=CUDA_ERROR)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    _, ending = gpu._run_trial(0, ())
    words = "torch.AcceleratorError: CUDA error: unspecified launch failure"
    assert ending == f"its process ended with code 1: {words}"


def run_here(capsys, skipped=()):
    """A trial of this processor's kernels."""
    trial.run(ops.device("cpu"), torch.device("cpu"), skipped)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("kernels")
def test_a_trial_calls_every_spelling_that_there_is(capsys, monkeypatch):
    called = []
    monkeypatch.setattr(selftest, "problem", lambda op_set, *rest: called.append((op_set.wanted, *rest)))
    said = run_here(capsys, skipped={"portable"})
    rows = [row for row in select.SPELLINGS if row.device == "cpu" and row.name in ops.device("cpu").features]
    cpu = torch.device("cpu")
    assert called == [(row.name, cpu, row.ops, row.dtypes) for row in rows if row.name != "portable"]
    assert said == [*({"trying": name} for name, *_ in called), DONE]


@pytest.mark.usefixtures("kernels")
def test_a_trial_runs_the_spelling_it_names(capsys, monkeypatch):
    """portable, which nothing runs that has not asked for it."""
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:1])
    used = []
    monkeypatch.setattr(trial.Trial, "_choose", lambda self, *a: used.append(real(self, *a)) or used[-1])
    assert run_here(capsys, skipped={"avx512", "avx2", "neon"}) == [{"trying": "portable"}, DONE]
    assert set(used) == {"portable"}


real = trial.Trial._choose


@pytest.mark.usefixtures("kernels")
def test_a_trial_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(trial, "Trial", lambda found, wanted: Negative())
    said = run_here(capsys, skipped={"avx512", "avx2", "neon"})
    assert said[1]["fault"].startswith("quantize_int4 gave")


class Negative:
    """core.reference, with the sign of activations wrong."""

    def __getattr__(self, op):
        right = getattr(reference, op)
        return lambda x, *rest, **dtype: right(-x, *rest, **dtype)


# ---- the verdict ----


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA H100 (80GB)")
    )
    monkeypatch.setattr(gpu, "open_driver", lambda: Driver(Functions()))


@pytest.mark.usefixtures("card")
def test_a_verdict_is_kept_beside_the_library_and_told_at_every_start(monkeypatch, tmp_path, caplog):
    library = tmp_path / "svdquant-cuda.so"
    script(monkeypatch, ([{"trying": "wgmma_e4m3_x4"}, {"fault": "gemm_int4 is off by 9"}, DONE], ""))
    with caplog.at_level(logging.WARNING, logger="svdquant-nodes"):
        first, second = (gpu.trusted(HOPPER, library, 0) for _ in range(2))
    assert first == second and first.distrusted == {"wgmma_e4m3_x4"} and not first.missing
    assert [file.name for file in tmp_path.iterdir()] == [
        f"svdquant-cuda-NVIDIA-H100-80GB--13000-{PYTHON}.json"
    ]
    assert len(caplog.records) == 2 and "wgmma_e4m3_x4 failed the self-test on NVIDIA H100" in caplog.text
    choice = select.choose(first, select.Request("gemm_int4", "bfloat16"))
    assert choice.spelling == "wgmma_e4m3" and choice.against["wgmma_e4m3_x4"] == ("it failed the self-test",)


@pytest.mark.usefixtures("card")
def test_without_a_library_the_verdict_is_about_torch_alone(monkeypatch, tmp_path):
    """And it stands apart, or a library that is built later would pass for tried."""
    found = select.Device("cuda", frozenset({select.BLOCK_SCALED}), (12, 0), missing="no compiler")
    script(monkeypatch, ([{"trying": "torch_scaled"}, DONE], ""), ([DONE], ""))
    library = tmp_path / "cache" / "svdquant-cuda.so"
    assert gpu.trusted(found, library, 0) == found
    kept = [file.name for file in library.parent.iterdir()]
    assert kept == [f"torch-{torch.__version__}-NVIDIA-H100-80GB--13000-{PYTHON}.json"]
    assert (
        gpu.trusted(replace(found, missing=""), library, 0).missing == ""
        and len(list(library.parent.iterdir())) == 2
    )


@pytest.mark.usefixtures("card")
def test_what_could_not_be_tried_is_not_used(monkeypatch, tmp_path):
    found = select.Device("cuda", frozenset({select.BLOCK_SCALED}), (12, 0), missing="no compiler")
    script(monkeypatch, ([], "no driver"))
    after = gpu.trusted(found, tmp_path / "svdquant-cuda.so", 0)
    assert after.missing == "no compiler" and after.distrusted == {"torch_scaled"}


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    "words",
    [
        ([], "no driver"),
        ([{"trying": "gemv"}, {"fault": "gemv_awq: CUDA out of memory"}, DONE], ""),
        ([{"trying": "gemv"}, {"fault": "all CUDA-capable devices are busy or unavailable"}, DONE], ""),
    ],
    ids=["not-tried", "no-memory", "another-process-has-the-card"],
)
def test_what_may_be_otherwise_next_time_is_not_kept(monkeypatch, tmp_path, words):
    script(monkeypatch, words, words)
    gpu.trusted(HOPPER, tmp_path / "svdquant-cuda.so", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("card")
def test_another_driver_is_tried_anew(monkeypatch, tmp_path):
    library = tmp_path / "svdquant-cuda.so"
    fault = {"fault": "gemm_int4 is off by 9"}
    script(monkeypatch, ([{"trying": "wgmma_e4m3"}, fault, DONE], ""), ([DONE], ""))
    assert gpu.trusted(HOPPER, library, 0).distrusted
    monkeypatch.setattr(Functions, "_DriverGetVersion", lambda _, to: setattr(to._obj, "value", 13010))
    assert not gpu.trusted(HOPPER, library, 0).distrusted


def test_other_python_is_tried_anew(tmp_path):
    """torch_scaled is nothing else, and its verdict may stand beside no library of ours."""
    folder = shutil.copytree(gpu.HERE, tmp_path / "kernels")
    assert gpu.sources(folder) == PYTHON
    other = shutil.copytree(gpu.HERE, tmp_path / "other")
    (other / "scaled.py").write_text("# changed")
    assert gpu.sources(other) != PYTHON


@pytest.mark.usefixtures("card")
def test_survivors_are_all_that_do_not_end_their_process(monkeypatch, tmp_path):
    """And a kept verdict says which those are."""
    crash = ([{"trying": "wgmma_e4m3"}], "its process ended with code 1: CUDA error")
    wrong = ([{"trying": "wgmma_s8"}, {"fault": "gemm_int8 is off by 9"}, DONE], "")
    script(monkeypatch, crash, wrong)
    for _ in range(2):
        assert gpu.survivors(HOPPER, tmp_path / "svdquant-cuda.so", 0).distrusted == {"wgmma_e4m3"}
    assert gpu.trusted(HOPPER, tmp_path / "svdquant-cuda.so", 0).distrusted == {"wgmma_e4m3", "wgmma_s8"}


@pytest.mark.usefixtures("card")
def test_a_damaged_verdict_is_made_anew(monkeypatch, tmp_path):
    (tmp_path / f"svdquant-cuda-NVIDIA-H100-80GB--13000-{PYTHON}.json").write_text("{")
    script(monkeypatch, ([DONE], ""))
    assert gpu.trusted(HOPPER, tmp_path / "svdquant-cuda.so", 0) == HOPPER
