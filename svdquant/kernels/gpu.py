"""What an NVIDIA GPU can do, and whether the kernels built for it may be trusted on it.

A kernel that is wrong on a card nobody has tried would paint noise and blame the model; one that crashes or hangs would
take the host with it. So a new library is first tried in a process of its own, on each model of GPU it meets
(trial.py). The spellings that fail are left out, with a line in the log; the verdict is kept beside the library, until
there is another driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from . import cuda, scaled, select
from .cache import Unavailable
from .driver import DriverError, open_driver
from .settings import settings

log = logging.getLogger("svdquant-nodes")

TRIAL_SECONDS = 90  # a trial takes ten; a kernel that waits in vain stops itself after twenty
HERE = Path(__file__).resolve().parent
PACK = HERE.parents[1]
# The pack under a name of its own: in the host it is called as its folder is.
_TRIAL = (
    "import sys, types; pack = types.ModuleType('svdquant_nodes'); pack.__path__ = [sys.argv[1]]; "
    "sys.modules['svdquant_nodes'] = pack; from svdquant_nodes.svdquant.kernels import trial; trial.main(sys.argv[2:])"
)


def find(index: int | None = None) -> select.Device:
    """A GPU as select.py wants it, with its library loaded; `missing` says why none of our kernels may run there."""
    found, library = load(index)
    if settings().kernels == "off" or not select.to_try(found):
        return found
    return trusted(found, library, _index(index))


def load(index: int | None = None) -> tuple[select.Device, Path | None]:
    """A GPU with its kernels loaded but not tried, and the file that holds them."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return select.Device("cuda", missing="torch finds no NVIDIA GPU"), None
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    here = every[_index(index)]
    features = {select.BLOCK_SCALED} if scaled.exists() else ()
    found = select.Device("cuda", frozenset(features), (here.major, here.minor))
    unfit = select.unfit(found.capability, here.name)
    if unfit:
        return replace(found, missing=unfit), None
    fit = sorted({(p.major, p.minor) for p in every if not select.unfit((p.major, p.minor), p.name)})
    kernels = cuda.load(_index(index), tuple(fit))
    return replace(found, missing=kernels.missing, by_nvrtc=kernels.by_nvrtc), kernels.file


def _index(index: int | None) -> int:
    return torch.cuda.current_device() if index is None else index


# ---- trust ----


def trusted(found: select.Device, library: Path, index: int) -> select.Device:
    """The device without the spellings that fail on it, which are logged.

    library   its place: where it could not be built, the spellings that need none are tried, and that verdict is apart
    """
    found_out = verdict(found, library, index)
    for spelling, fault in found_out.faults.items():
        log.warning(
            "SVDQuant: kernel %s failed the self-test on %s and is not used: %s. Please report this line.",
            spelling,
            torch.cuda.get_device_properties(index).name,
            fault,
        )
    distrusted = {row.name for row in select.to_try(found)} if found_out.untried else found_out.faults
    return replace(found, distrusted=frozenset(distrusted), missing=found.missing or found_out.untried)


def survivors(found: select.Device, library: Path, index: int) -> select.Device:
    """The device without the spellings that end a process on it, for whoever wants to see what is wrong with others."""
    return replace(found, distrusted=frozenset(verdict(found, library, index).deadly))


@dataclass(frozen=True)
class Verdict:
    """What a trial found.

    faults    spelling -> what was wrong with it
    untried   why nothing could be tried, "" if it could
    deadly    those at fault that took the process along: nothing else can be computed after them
    """

    faults: dict[str, str]
    untried: str = ""
    deadly: tuple[str, ...] = ()


def verdict(found: select.Device, library: Path, index: int) -> Verdict:
    """What a trial of a library on a GPU finds, or has found under the same driver, by the same Python."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_properties(index).name)
    of = f"torch-{torch.__version__}" if found.missing else library.stem
    kept = library.with_name(f"{of}-{name}-{_driver()}-{sources(HERE)}.json")
    known = _recall(kept)
    if known is None:
        known = judge(index)
        _keep(kept, known)
    return known


@cache
def sources(folder: Path) -> str:
    """Eight hex digits of the Python that starts kernels, computes without them (scaled.py), and judges."""
    files = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _driver() -> int:
    """The version of the CUDA that the driver is for; 0 where it cannot be asked."""
    try:
        return open_driver().version()
    except (Unavailable, DriverError):
        return 0


def judge(index: int) -> Verdict:
    """Try every spelling that a GPU could run. One that ends its process is at fault, and the rest go on without it."""
    torch.cuda.empty_cache()  # room for another process on a card that a model fills
    faults: dict[str, str] = {}
    deadly: list[str] = []
    while True:
        known = len(faults)
        said, ending = _run_trial(index, faults)
        trying = ""
        for word in said:
            trying = word.get("trying", trying)
            if "fault" in word:
                faults[trying] = word["fault"]
        if not ending:
            return Verdict(faults, deadly=tuple(deadly))
        if trying:
            faults.setdefault(trying, ending)
            deadly.append(trying)
        if len(faults) == known:
            return Verdict(faults, f"they could not be tried: {ending}")


def _run_trial(index: int, skipped: Iterable[str]) -> tuple[list[dict[str, str]], str]:
    """What a trial said before it ended, and how it ended: "" if well."""
    command = [sys.executable, "-c", _TRIAL, str(PACK), str(index), *skipped]
    environment = {**os.environ, "SVDQUANT_KERNELS": "auto"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        return _words(error.stdout or b""), f"it did not end within {TRIAL_SECONDS} s"
    except OSError as error:
        return [], f"{sys.executable} does not start ({error})"
    said = _words(done.stdout)
    if done.returncode == 0 and said and "done" in said[-1]:
        return said, ""
    return said, f"its process ended with code {done.returncode}: {_last_word(done.stderr)[:300]}"


def _last_word(errors: str) -> str:
    """The exception's line: CUDA's have some of advice behind it."""
    lines = errors.strip().splitlines() or ["without a word"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])


def _words(output: str | bytes) -> list[dict[str, str]]:
    """The trial's own lines, among whatever else was printed."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"') and line.endswith("}")]


def _recall(kept: Path) -> Verdict | None:
    try:
        known = json.loads(kept.read_text())
        return Verdict(dict(known["faults"]), deadly=tuple(known["deadly"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(kept: Path, verdict: Verdict) -> None:
    """Remember a verdict, unless another start could find otherwise."""
    passing = "out of memory|busy or unavailable"
    if verdict.untried or any(re.search(passing, fault) for fault in verdict.faults.values()):
        return
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"faults": verdict.faults, "deadly": verdict.deadly}))
