"""One running ComfyUI for each supported version, shared by all tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from svdquant_nodes.tests.host_trees import host_trees
from svdquant_nodes.tools.host.client import ComfyClient
from svdquant_nodes.tools.host.places import Host
from svdquant_nodes.tools.host.server import ComfyServer

HOSTS = host_trees()
SMALL_NODES = Path(__file__).with_name("small_nodes.py").resolve()


@dataclass(frozen=True)
class Comfy:
    """A running host: how to talk to it, the folder with its models/ and output/, its version and its server."""

    client: ComfyClient
    base_dir: Path
    version: str
    server: ComfyServer


@pytest.fixture(
    scope="session", params=HOSTS or [None], ids=lambda host: f"comfyui-{host.version}" if host else "none"
)
def host(request: pytest.FixtureRequest) -> Host:
    """A ComfyUI tree and its Python, not started: for tests that run a script of their own inside it."""
    return request.param


@pytest.fixture(scope="session")
def comfy(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """The host, started once, with this pack and the nodes that make small models for tests."""
    base = tmp_path_factory.mktemp(f"comfyui-{host.version}")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / SMALL_NODES.name).symlink_to(SMALL_NODES)
    with ComfyServer(host, base) as server:
        yield Comfy(server.client, server.base, host.version, server)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows what its host printed meanwhile."""
    report = yield
    comfy = getattr(item, "funcargs", {}).get("comfy")
    if report.failed and comfy is not None:
        report.sections.append((f"log of ComfyUI {comfy.version}", comfy.server.log_text()[-4000:]))
    return report
