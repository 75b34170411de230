"""The set-up: what is done stays done, what was cut off is done again, what is not ours is left alone."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading

import pytest

from svdquant_nodes.tools.host import install, places
from svdquant_nodes.tools.host.install import Part
from svdquant_nodes.tools.host.places import SetupError
from svdquant_nodes.tools.host.steps import Steps


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Environment and hosts in a folder of the test's, and no ComfyUI of the user's."""
    monkeypatch.setenv("SVDQUANT_VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("SVDQUANT_HOSTS_DIR", str(tmp_path / "hosts"))
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON", "SVDQUANT_STARTED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def parts(monkeypatch):
    """Three parts that only write down that they were installed; the test may change the contents."""
    log, contents = [], {"first": "1", "second": "1", "third": "1"}

    def part(name):
        return Part(name, contents[name], lambda cut_off: log.append((name, cut_off)))

    monkeypatch.setattr(install, "_parts", lambda: [part(name) for name in contents])
    monkeypatch.setattr(install, "_starts", lambda *arguments: True)
    return log, contents


def test_a_second_run_installs_nothing(parts, capsys):
    log, _ = parts
    install.ensure_venv(Steps())
    assert log == [("first", False), ("second", False), ("third", False)]
    capsys.readouterr()
    install.ensure_venv(Steps())
    assert len(log) == 3
    assert capsys.readouterr().out == ""


def test_a_changed_part_is_installed_with_all_after_it(parts):
    log, contents = parts
    install.ensure_venv(Steps())
    contents["second"] = "2"
    install.ensure_venv(Steps())
    assert log[3:] == [("second", False), ("third", False)]


def test_a_part_that_was_cut_off_is_installed_by_force(parts, monkeypatch):
    log, contents = parts
    good = install._parts()

    def cut(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        install, "_parts", lambda: [good[0], Part("second", contents["second"], cut), good[2]]
    )
    with pytest.raises(KeyboardInterrupt):
        install.ensure_venv(Steps())
    monkeypatch.setattr(install, "_parts", lambda: good)
    install.ensure_venv(Steps())
    assert log == [("first", False), ("second", True), ("third", False)]


def test_a_folder_that_is_no_environment_is_refused_and_kept(scratch):
    (scratch / "venv").mkdir()
    (scratch / "venv" / "thesis.txt").write_text("years of work")
    with pytest.raises(SetupError, match="expected an empty folder or an environment"):
        install.ensure_venv(Steps())
    assert [file.name for file in (scratch / "venv").iterdir()] == ["thesis.txt"]


def test_a_failed_command_is_told_in_a_sentence(scratch):
    with pytest.raises(
        SetupError, match=r"could not do it: ERROR: no such thing \(all of it: .*setup\.log\)"
    ):
        install.run_logged(
            ["sh", "-c", "echo noise; echo ERROR: no such thing; echo bye; exit 3"], "could not do it"
        )
    assert "noise" in (scratch / "hosts" / "setup.log").read_text()


def test_two_set_ups_take_turns(parts, scratch, capsys):
    fcntl = pytest.importorskip("fcntl")
    (scratch / "hosts").mkdir()
    with (scratch / "hosts" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.3, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        install.ensure_venv(Steps())
    assert "wait for another set-up to end" in capsys.readouterr().out
    assert len(parts[0]) == 3


def test_a_command_that_outlives_the_set_up_keeps_the_lock(scratch):
    fcntl = pytest.importorskip("fcntl")
    with install._one_at_a_time(Steps()):
        install.run_logged(["sh", "-c", "sleep 2 >/dev/null 2>&1 &"], "could not")
    with (scratch / "hosts" / "lock").open("w") as next_one, pytest.raises(BlockingIOError):
        fcntl.flock(next_one, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sdist(folder, files):
    """A source archive with these files, as pip would have fetched it."""
    file = folder / "carrier-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"carrier-1.0/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return file


@pytest.fixture
def archive(scratch, monkeypatch):
    files = {
        "vendor/ComfyUI/main.py": "",
        "vendor/ComfyUI/comfy/sd.py": "",
        "setup.py": "",
        "vendor/other/x.py": "",
    }
    files["vendor/ComfyUI/comfyui_version.py"] = '__version__ = "9.9.9"\n'
    file = sdist(scratch, files)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(install.ARCHIVES, "9.9.9", install.Archive("carrier", "1.0", sha256))
    monkeypatch.setattr(install, "_download", lambda archive, folder: file)
    return file


def test_only_the_tree_is_unpacked(archive):
    tree = install.ensure_tree("9.9.9", Steps())
    names = {file.relative_to(tree).as_posix() for file in tree.rglob("*") if file.is_file()}
    assert names == {"main.py", "comfy/sd.py", "comfyui_version.py", ".archive-sha256"}
    assert places.tree_version(tree) == "9.9.9"


def test_a_tree_without_its_stamp_is_unpacked_again(archive):
    tree = install.ensure_tree("9.9.9", Steps())
    (tree / ".archive-sha256").unlink()
    (tree / "main.py").write_text("half")
    assert install.ensure_tree("9.9.9", Steps()) == tree
    assert (tree / "main.py").read_text() == ""


def test_a_whole_tree_is_not_fetched_again(archive, monkeypatch):
    install.ensure_tree("9.9.9", Steps())
    monkeypatch.setattr(install, "_download", None)
    install.ensure_tree("9.9.9", Steps())


def test_an_unknown_version_names_the_known_ones():
    with pytest.raises(SetupError, match=r"ComfyUI 1\.2: expected one of 0\.30\.0, 0\.16\.3"):
        install.ensure_tree("1.2", Steps())


def test_the_users_comfyui_comes_first(scratch, monkeypatch):
    tree, python = scratch / "mine", scratch / "python"
    tree.mkdir()
    (tree / "main.py").touch()
    python.touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    monkeypatch.setenv("COMFYUI_PYTHON", str(python))
    assert install.ensure_host("0.30.0", Steps()) == places.Host(tree, python, "unknown")
    assert not (scratch / "venv").exists()


def test_a_folder_without_comfyui_is_named(scratch, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(scratch))
    with pytest.raises(SetupError, match=r"expected a ComfyUI folder, found no main\.py"):
        places.users_host()
