"""A headless ComfyUI with this pack as its only custom node, for the length of a `with` block.

    with ComfyServer(host) as server:
        result = server.client.run(prompt)

It has a folder of its own for models, inputs and outputs, so nothing of the user's is read or written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
from pathlib import Path
from typing import Any

from .client import ComfyClient
from .places import ROOT, Host, SetupError

LAUNCH = Path(__file__).with_name("launch.py")
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae")
# Two OpenMP threads on a small machine wait for each other longer than they work.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
COLOURS = re.compile("\x1b\\[[0-9;]*m")
STARTING = 180  # seconds it may take to answer for the first time


class ComfyServer:
    """Starts `host` on a free port; `base` holds custom_nodes, models, input, output and the log.

    base       a folder to use and leave; without it a temporary one, removed at the end
    pack       the folder linked into custom_nodes as `svdquant-nodes`
    device     "cpu", or "auto" for whatever ComfyUI finds
    arguments  further words for main.py
    environment  further variables
    """

    def __init__(
        self,
        host: Host,
        base: Path | None = None,
        *,
        pack: Path = ROOT,
        device: str = "cpu",
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.host = host
        self.base = base or Path(tempfile.mkdtemp(prefix="svdquant-host-"))
        self.log = self.base / "server.log"
        self._temporary = base is None
        self._pack = pack
        self._arguments = ("--cpu", *arguments) if device == "cpu" else arguments
        self._environment = {
            **os.environ,
            **ONE_THREAD,
            **(environment or {}),
            "SVDQUANT_STOP_WITH_STDIN": "1",
        }

    def __enter__(self) -> ComfyServer:
        try:
            self._lay_out()
            self.url = f"http://127.0.0.1:{_free_port()}"
            self.client = ComfyClient(self.url)
            self._start()
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            _stop(process)
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def log_text(self) -> str:
        """All that the host has printed so far, without its colours."""
        return COLOURS.sub("", self.log.read_text(errors="replace")) if self.log.is_file() else ""

    def _lay_out(self) -> None:
        for folder in ("custom_nodes", "input", "output", *(f"models/{kind}" for kind in MODEL_FOLDERS)):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / "svdquant-nodes"
        if not link.is_symlink():
            link.symlink_to(self._pack.resolve(), target_is_directory=True)

    def _start(self) -> None:
        port = self.url.rpartition(":")[2]
        command = [self.host.python, LAUNCH, self.host.tree, "--listen", "127.0.0.1", "--port", port]
        command += ["--base-directory", self.base, "--database-url", f"sqlite:///{self.base}/comfyui.db"]
        command += ["--disable-api-nodes"]  # also keeps the page from asking the internet
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in [*command, *self._arguments]],
                env=self._environment,
                stdin=subprocess.PIPE,  # closed when we end: launch.py stops the host then
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + STARTING
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SetupError(
                    self._obituary(f"ended with exit code {self.process.returncode} while starting")
                )
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.client.get("/system_stats")
                return
            time.sleep(0.1)
        raise SetupError(self._obituary(f"did not answer within {STARTING} s"))

    def _obituary(self, what: str) -> str:
        last = "\n".join(self.log_text().strip().splitlines()[-15:])
        return f"ComfyUI {self.host.version} {what}. The last lines of its log:\n{last}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stop(process: subprocess.Popen[bytes], patience: float = 5) -> None:
    """End the host and whatever it started: politely, then not."""
    for how in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how) if hasattr(os, "killpg") else process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    if process.stdin:
        process.stdin.close()
