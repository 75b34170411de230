"""As much of a Hugging Face Hub as downloading a file needs, on the loopback, with faults to order."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked.

    files       owner/repo/path -> bytes
    gated       repositories that need the token "secret"
    cut_after   break every connection after so many bytes of a body; None: never
    no_ranges   answer 200 with the whole file whatever range was asked for
    damage      change a byte of every body
    requests    (method, path, range asked for, authorization)
    sent        bytes of bodies
    storage     address that files are redirected to, set by `serve`
    """

    files: dict[str, bytes]
    gated: set[str] = field(default_factory=set)
    cut_after: int | None = None
    no_ranges: bool = False
    damage: bool = False
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    sent: int = 0
    storage: str = ""

    def methods(self) -> list[str]:
        return [method for method, *_ in self.requests]


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Run on two free ports of 127.0.0.1, the hub's and its storage's; yields the hub's address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
    endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield endpoint
    for server in servers:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that hangs up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    """/owner/repo/resolve/revision/path redirects to /cdn/sha256 of another origin, as for large files."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        asked, token = self.headers.get("Range"), self.headers.get("Authorization")
        self.hub.requests.append((self.command, self.path, asked, token))
        if self.path.startswith("/cdn/"):
            self.body(next(b for b in self.hub.files.values() if self.path.endswith(_sha(b))))
            return
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repo, revision, path = match.groups()
        if not any(name.startswith(f"{repo}/") for name in self.hub.files):
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif repo in self.hub.gated and token != "Bearer secret":
            self.refuse(403, "GatedRepo", "Access to this repository is restricted")
        elif revision not in ("main", "v2", COMMIT):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif f"{repo}/{path}" not in self.hub.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            self.redirect(self.hub.files[f"{repo}/{path}"])

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def redirect(self, data: bytes) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.hub.storage}/cdn/{_sha(data)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{_sha(data)}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def body(self, data: bytes) -> None:
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not self.hub.no_ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = bytearray(data[start:])
        if self.hub.damage:
            rest[0] ^= 1
        if self.command == "GET":
            self.send_body(bytes(rest))

    def send_body(self, rest: bytes) -> None:
        limit = self.hub.cut_after
        self.hub.sent += len(rest[:limit])
        self.wfile.write(rest[:limit])
        if limit is not None and limit < len(rest):
            self.close_connection = True
            self.wfile.flush()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
