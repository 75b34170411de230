"""Visual Studio's variables, with its two programs played by the test: there is no Windows here."""

from __future__ import annotations

import subprocess

import pytest

from svdquant_nodes.svdquant.kernels import jit, msvc

SET = "=C:=C:\\Users\nPath=C:\\VC\\bin;C:\\Windows\nINCLUDE=C:\\VC\\include\nODD=a=b\n"


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """An installed Visual Studio; returns the environment before, and what was run."""
    finder = tmp_path.joinpath(*msvc._INSTALLER)
    batch = tmp_path.joinpath("2022", *msvc._VARIABLES)
    for file in (finder, batch):
        file.parent.mkdir(parents=True)
        file.touch()
    ran = []

    def run(command, **options):
        ran.append(command)
        said = f"{tmp_path / '2022'}\r\n" if isinstance(command, list) else SET
        return subprocess.CompletedProcess(command, 0, stdout=said)

    monkeypatch.setattr(msvc.subprocess, "run", run)
    return {"PROGRAMFILES(X86)": str(tmp_path), "PATH": "C:\\Windows", "CXX": "cl"}, ran


def test_variables_are_those_of_the_batch_file(studio):
    before, ran = studio
    after = msvc.variables(before)
    told = {"PATH": "C:\\VC\\bin;C:\\Windows", "INCLUDE": "C:\\VC\\include", "ODD": "a=b"}
    assert after == {**before, **told}
    assert len(ran) == 2 and "vcvars64.bat" in ran[1]


def test_without_visual_studio_nothing_changes(tmp_path):
    before = {"PROGRAMFILES(X86)": str(tmp_path), "PATH": "C:\\Windows"}
    assert msvc.variables(before) == before
    assert msvc.variables({"PATH": "C:\\Windows"}) == {"PATH": "C:\\Windows"}


@pytest.mark.parametrize(
    "problem", [OSError("broken"), subprocess.TimeoutExpired("cmd", 120)], ids=["fails", "hangs"]
)
def test_a_finder_that_does_not_answer_changes_nothing(studio, monkeypatch, problem):
    before, _ = studio

    def run(*_, **options):
        raise problem

    monkeypatch.setattr(msvc.subprocess, "run", run)
    assert msvc.variables(before) == before


def test_a_build_on_windows_uses_them(studio, monkeypatch):
    before, _ = studio
    monkeypatch.setattr(jit, "WINDOWS", True)
    monkeypatch.setattr(jit.os, "environ", before)
    seen = {}
    monkeypatch.setattr(jit, "_check_tools", seen.update)
    environment = jit._environment(jit.Target("cpu", "cpu", ()))
    assert environment["INCLUDE"] == seen["INCLUDE"] == "C:\\VC\\include"
