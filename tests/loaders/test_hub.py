"""The real huggingface_hub client against a small hub on the loopback: nothing leaves 127.0.0.1."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import file_download

from svdquant_nodes.loaders import hub
from svdquant_nodes.tests.loaders.hub_server import COMMIT, Hub, serve

FILE = "lab/tiny/model.safetensors"
DATA = bytes(range(256)) * 4096  # 1 MiB
CHUNK = (
    1 << 16
)  # the client writes whole chunks; what it has of the next one when a connection breaks is lost
SIX_CHUNKS = 6 * CHUNK
OTHER = "lab/tiny/sub/other.safetensors"


@pytest.fixture
def server(monkeypatch):
    """A hub with two files, and a client that knows no other."""
    state = Hub({FILE: DATA, OTHER: DATA[::-1]})
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
    for module in (huggingface_hub.constants, file_download):  # where releases of the client look for it
        monkeypatch.setattr(module, "DOWNLOAD_CHUNK_SIZE", CHUNK, raising=False)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # between the client's own retries
    with serve(state) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield state


class Seen(list):
    """A progress callback that remembers, and can stop the download once so much is done."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at

    def __call__(self, done, total):
        self.append((done, total))
        if self.stop_at is not None and done >= self.stop_at:
            raise Stopped


class Stopped(Exception):
    pass


# ---- names ----


def test_published_names_are_sources_of_safetensors():
    assert {"flux.1-dev-int4", "flux.1-dev-fp4", "qwen-image-r128-int4", "t5xxl-int4"} <= set(hub.PUBLISHED)
    for name, entry in hub.PUBLISHED.items():
        source = hub.parse(name)
        assert entry.name == name and entry.folder in ("diffusion_models", "text_encoders")
        assert source.repo.startswith("nunchaku-tech/nunchaku-") and source.revision == "main"


def test_published_flux_dev():
    source = hub.parse("flux.1-dev-int4")
    assert source == hub.Source("nunchaku-tech/nunchaku-flux.1-dev", "svdq-int4_r32-flux.1-dev.safetensors")


@pytest.mark.parametrize(
    "text, repo, file, revision",
    [
        ("a/b/c.safetensors", "a/b", "c.safetensors", "main"),
        ("a/b/sub/dir/c.safetensors", "a/b", "sub/dir/c.safetensors", "main"),
        ("a/b/c.safetensors@v2", "a/b", "c.safetensors", "v2"),
        ("a/b/c.safetensors@refs/pr/3", "a/b", "c.safetensors", "refs/pr/3"),
        ("https://huggingface.co/a/b/resolve/main/sub/c.safetensors", "a/b", "sub/c.safetensors", "main"),
        ("https://huggingface.co/a/b/blob/v2/c.safetensors?download=true", "a/b", "c.safetensors", "v2"),
    ],
    ids=["plain", "subfolder", "revision", "revision-with-slashes", "address", "address-of-a-page"],
)
def test_parse(text, repo, file, revision):
    source = hub.parse(text)
    assert (source.repo, source.file, source.revision) == (repo, file, revision)
    assert source.name == "c.safetensors"


@pytest.mark.parametrize(
    "text, message",
    [
        ("flux.1-dev-int5", r"expected a published name \(flux.1-dev-int4, .*--list"),
        ("b/c.safetensors", "expected a published name"),
        ("", "expected a published name"),
        ("a/b/../../c.safetensors", "expected a published name"),
        ("a/b/..\\c.safetensors", "expected a published name"),
        ("/etc/b/c.safetensors", "expected a published name"),
        ("https://example.org/a/b/resolve/main/c.safetensors", "expected a published name"),
        ("a/b/c.ckpt", r"expected a \.safetensors file"),
        ("a/b/c.safetensors.zip", r"expected a \.safetensors file"),
        ("a..b/b/c.safetensors", "Cannot have -- or .. in repo_id"),
    ],
    ids=[
        "no-such-name",
        "no-repo",
        "empty",
        "climbs",
        "backslash",
        "absolute",
        "elsewhere",
        "pickle",
        "zip",
        "bad-repo",
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        hub.parse(text)


# ---- fetching ----


def test_fetches_into_a_new_folder(server, tmp_path):
    path = hub.fetch(FILE, tmp_path / "models" / "new")
    assert path == tmp_path / "models" / "new" / "model.safetensors"
    assert path.read_bytes() == DATA
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_subfolders_of_the_repository_are_dropped(server, tmp_path):
    assert hub.fetch(OTHER, tmp_path) == tmp_path / "other.safetensors"
    assert (tmp_path / "other.safetensors").read_bytes() == DATA[::-1]


def test_revision_is_asked_for_and_the_commit_pinned(server, tmp_path):
    hub.fetch(f"{FILE}@v2", tmp_path)
    resolved = [path for _, path, *_ in server.requests if "resolve" in path]
    assert resolved == [
        "/lab/tiny/resolve/v2/model.safetensors",
        f"/lab/tiny/resolve/{COMMIT}/model.safetensors",
    ]


def test_progress_is_monotone_and_complete(server, tmp_path):
    seen = Seen()
    hub.fetch(FILE, tmp_path, progress=seen)
    assert seen[0] == (0, len(DATA)) and seen[-1] == (len(DATA), len(DATA))
    assert len(seen) > 4 and seen == sorted(seen)


def test_second_call_downloads_nothing(server, tmp_path):
    hub.fetch(FILE, tmp_path)
    before = server.sent
    seen = Seen()
    assert hub.fetch(FILE, tmp_path, progress=seen).read_bytes() == DATA
    assert server.sent == before and seen == []
    assert server.methods().count("GET") == 2  # of the first call: the hub and where it redirected to


def test_a_stopped_download_goes_on_where_it_stopped(server, tmp_path):
    with pytest.raises(Stopped):
        hub.fetch(FILE, tmp_path, progress=Seen(stop_at=300_000))
    (part,) = tmp_path.iterdir()
    kept = part.stat().st_size
    assert part.suffix == ".part" and 300_000 <= kept < len(DATA)
    server.requests.clear()
    seen = Seen()
    assert hub.fetch(FILE, tmp_path, progress=seen).read_bytes() == DATA
    assert seen[0] == (kept, len(DATA)) and seen == sorted(seen)
    assert {asked for method, path, asked, _ in server.requests if method == "GET"} == {f"bytes={kept}-"}
    assert not part.exists()


def test_a_cut_connection_is_taken_up_again(server, tmp_path):
    server.cut_after = SIX_CHUNKS
    seen = Seen()
    assert hub.fetch(FILE, tmp_path, progress=seen).read_bytes() == DATA
    assert server.sent == len(DATA) and seen == sorted(seen) and seen[-1] == (len(DATA), len(DATA))


def test_a_connection_that_stays_broken_keeps_its_part(server, tmp_path):
    server.cut_after = SIX_CHUNKS
    broken = Seen()

    def one_part_only(done, total):
        broken(done, total)
        if done >= SIX_CHUNKS:
            server.cut_after = 0

    with pytest.raises(hub.Unreachable, match=r"393216 of 1048576 bytes are kept, run it again"):
        hub.fetch(FILE, tmp_path, progress=one_part_only)
    server.cut_after, server.sent = None, 0
    assert hub.fetch(FILE, tmp_path).read_bytes() == DATA
    assert server.sent == len(DATA) - SIX_CHUNKS


def test_a_part_of_another_version_is_not_continued(server, tmp_path):
    with pytest.raises(Stopped):
        hub.fetch(FILE, tmp_path, progress=Seen(stop_at=300_000))
    server.files[FILE] = DATA[::-1]
    assert hub.fetch(FILE, tmp_path).read_bytes() == DATA[::-1]


def test_a_server_without_ranges_never_makes_a_wrong_file(server, tmp_path):
    """Newer clients start anew, older ones append and are found out; the second try is good in either case."""
    with pytest.raises(Stopped):
        hub.fetch(FILE, tmp_path, progress=Seen(stop_at=300_000))
    server.no_ranges = True
    try:
        path = hub.fetch(FILE, tmp_path)
    except hub.Unreachable:
        path = hub.fetch(FILE, tmp_path)
    assert path.read_bytes() == DATA


def test_a_damaged_download_is_removed(server, tmp_path):
    server.damage = True
    with pytest.raises(ValueError, match=r"damaged .SHA-256 differs. and was removed"):
        hub.fetch(FILE, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what is already there ----


def test_another_file_of_the_name_is_never_overwritten(server, tmp_path):
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(
        ValueError, match=r"another file of this name, with 4 bytes, the published one 1048576"
    ):
        hub.fetch(FILE, tmp_path)
    assert mine.read_bytes() == b"mine" and server.sent == 0


def test_verify_compares_the_hash(server, tmp_path):
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(DATA[::-1])
    with pytest.raises(ValueError, match="another SHA-256 than the published one"):
        hub.fetch(FILE, tmp_path, verify=True)
    mine.write_bytes(DATA)
    assert hub.fetch(FILE, tmp_path, verify=True) == mine


# ---- refusals ----


def test_missing_file(server, tmp_path):
    with pytest.raises(ValueError, match=r"lab/tiny: has no file nothing\.safetensors\. See https"):
        hub.fetch("lab/tiny/nothing.safetensors", tmp_path)


def test_missing_revision(server, tmp_path):
    with pytest.raises(ValueError, match="lab/tiny: has no revision 'v9'"):
        hub.fetch(f"{FILE}@v9", tmp_path)


def test_missing_repository(server, tmp_path):
    with pytest.raises(ValueError, match="lab/none: no such repository, or it is private"):
        hub.fetch("lab/none/model.safetensors", tmp_path)


def test_gated_repository_asks_for_terms_and_token(server, tmp_path, monkeypatch):
    server.gated.add("lab/tiny")
    with pytest.raises(ValueError, match=r"access is gated\. Accept its terms at https.* and set HF_TOKEN"):
        hub.fetch(FILE, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub.fetch(FILE, tmp_path).read_bytes() == DATA
    assert {token for _, path, _, token in server.requests if path.startswith("/cdn/")} == {None}


def test_no_network(tmp_path, monkeypatch):
    with socket.socket() as closed:  # bound, never listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(
            hub.Unreachable, match=r"cannot reach the hub .* put the file at .*model\.safetensors"
        ):
            hub.fetch(FILE, tmp_path)
        mine = tmp_path / "model.safetensors"
        mine.write_bytes(b"mine")
        assert hub.fetch(FILE, tmp_path) == mine


def test_an_endpoint_that_is_no_hub(tmp_path, server, monkeypatch):
    monkeypatch.setattr(
        hub, "get_hf_file_metadata", lambda url: namedtuple("Answer", "size commit_hash")(5, None)
    )
    with pytest.raises(ValueError, match=r"not the answer of a Hugging Face Hub. Check HF_ENDPOINT"):
        hub.fetch(FILE, tmp_path)


def test_no_space_is_known_before_the_transfer(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 5, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"no space in .* for 1048576 bytes .*5 bytes are free.*run it again"
    ):
        hub.fetch(FILE, tmp_path)
    assert server.sent == 0


def test_no_space_in_the_middle(server, tmp_path):
    def full(done, total):
        if done > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"no space in .* Free some, run it again"):
        hub.fetch(FILE, tmp_path, progress=full)
    assert hub.fetch(FILE, tmp_path).read_bytes() == DATA


def test_a_folder_that_is_a_file(server, tmp_path):
    (tmp_path / "models").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to .* Choose another folder"):
        hub.fetch(FILE, tmp_path / "models")


# ---- the command, in a process of its own, so that the client reads the environment itself ----

ROOT = Path(hub.__file__).resolve().parents[1]


def command(*arguments, **environment):
    # the client's own parent folder: the process finds the very client that this one tests
    paths = os.pathsep.join(
        [str(Path(huggingface_hub.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "svdquant"), "fetch", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return run.returncode, run.stdout, run.stderr


def test_command_fetches(server, tmp_path):
    code, out, err = command(FILE, "--folder", tmp_path)
    assert (code, out) == (0, f"{tmp_path / 'model.safetensors'}\n"), err
    assert (tmp_path / "model.safetensors").read_bytes() == DATA


def test_command_puts_it_into_comfyui(server, tmp_path):
    (tmp_path / "models").mkdir()
    code, out, err = command(FILE, COMFYUI_PATH=str(tmp_path))
    assert (code, out) == (0, f"{tmp_path / 'models' / 'diffusion_models' / 'model.safetensors'}\n"), err


def test_command_offline_says_where_to_put_the_file(server, tmp_path):
    code, _, err = command(FILE, "--folder", tmp_path, HF_HUB_OFFLINE="1")
    assert code != 0 and server.requests == []
    assert "offline mode is on. Unset HF_HUB_OFFLINE" in err
    assert f"put the file at {tmp_path / 'model.safetensors'}" in err
    (tmp_path / "model.safetensors").write_bytes(DATA)
    code, out, _ = command(FILE, "--folder", tmp_path, HF_HUB_OFFLINE="1")
    assert (code, out) == (0, f"{tmp_path / 'model.safetensors'}\n")


def test_command_lists_names():
    code, out, _ = command("--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(hub.PUBLISHED)


def test_command_without_a_name():
    code, _, err = command()
    assert code != 0 and "expected a name or a file of a repository. --list shows" in err


def test_command_says_a_wrong_name_first(tmp_path):
    code, _, err = command("a/b.ckpt", COMFYUI_PATH=str(tmp_path))
    assert code != 0 and "a/b.ckpt: expected a published name" in err
    code, _, err = command(FILE, COMFYUI_PATH=str(tmp_path))
    assert code != 0 and f"expected a ComfyUI with a models folder, got none at {tmp_path}" in err
