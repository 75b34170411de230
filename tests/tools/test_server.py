"""The host process: it ends with the block, with its parent, and not without a word when it dies."""

from __future__ import annotations

import subprocess
import sys

import pytest

from svdquant_nodes.tools.host import server
from svdquant_nodes.tools.host.places import Host, SetupError
from svdquant_nodes.tools.host.server import ComfyServer

# Stands in for main.py: answers /system_stats on the port it is given.
ANSWERS = """
import http.server, os, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
print("threads", os.environ["OMP_NUM_THREADS"], "arguments", *sys.argv[1:], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.fixture
def host(tmp_path):
    """Makes a host whose main.py is the given text."""

    def make(main):
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "main.py").write_text(main)
        return Host(tmp_path / "tree", sys.executable, "test")

    return make


def test_it_runs_for_the_length_of_the_block(host, tmp_path):
    with ComfyServer(host(ANSWERS), tmp_path / "base", arguments=("--extra",)) as running:
        assert running.client.get("/anything") == {}
        assert (tmp_path / "base" / "custom_nodes" / "svdquant-nodes" / "pyproject.toml").is_file()
        assert (tmp_path / "base" / "models" / "loras").is_dir()
    assert running.process.returncode is not None
    log = running.log_text()
    assert "threads 1" in log and "--cpu --extra" in log


def test_a_temporary_base_is_removed(host):
    with ComfyServer(host(ANSWERS)) as running:
        assert running.base.is_dir()
    assert not running.base.exists()


def test_a_host_that_dies_leaves_its_last_words(host):
    with pytest.raises(SetupError, match=r"(?s)ended with exit code 7 while starting.*out of cheese"):
        ComfyServer(host("import sys; print('out of cheese', flush=True); sys.exit(7)")).__enter__()


def test_a_host_that_never_answers_is_stopped(host, monkeypatch):
    monkeypatch.setattr(server, "STARTING", 0.5)
    silent = ComfyServer(host("import time; time.sleep(60)"))
    with pytest.raises(SetupError, match=r"did not answer within 0\.5 s"):
        silent.__enter__()
    assert silent.process.returncode is not None


def test_it_ends_when_its_parent_does(host, tmp_path):
    command = [sys.executable, server.LAUNCH, host("import time; time.sleep(60)").tree]
    environment = {"SVDQUANT_STOP_WITH_STDIN": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        process.stdin.close()
        assert process.wait(20) == 1


def test_colours_are_left_out_of_the_log(host, tmp_path):
    running = ComfyServer(host(ANSWERS), tmp_path)
    running.log.write_text("\x1b[32m[INFO]\x1b[0m plain")
    assert running.log_text() == "[INFO] plain"
