"""The workflows in the real web page: all are opened and drawn; the demo is queued and its picture shown.

Leaves artifacts/demo-ui.png.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from svdquant_nodes.tests.host_trees import host_trees
from svdquant_nodes.tools.host.browser import find_browser
from svdquant_nodes.tools.host.places import ROOT
from svdquant_nodes.tools.host.server import ComfyServer

WORKFLOW = ROOT / "workflows" / "demo.json"
OTHERS = sorted(file for file in (ROOT / "workflows").glob("*.json") if file != WORKFLOW)
SCREENSHOT = ROOT / "artifacts" / "demo-ui.png"
SCRIPT = ROOT / "tests" / "ui" / "open_workflow.cjs"
PATIENCE = 60  # seconds for any one thing in the page


@pytest.fixture(scope="module")
def server():
    with ComfyServer(host_trees()[0]) as server:
        yield server


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """What the script saw when it opened, queued and watched the workflow."""
    browser = find_browser()
    SCREENSHOT.parent.mkdir(exist_ok=True)
    SCREENSHOT.unlink(missing_ok=True)
    options = {"url": server.url, "workflow": WORKFLOW, "screenshot": SCREENSHOT, "seconds": PATIENCE}
    options |= {"others": OTHERS}
    options |= {"chromium": browser.chromium, "playwright": browser.playwright}
    file = tmp_path_factory.mktemp("ui") / "options.json"
    file.write_text(json.dumps(options, default=str))
    done = subprocess.run([browser.node, SCRIPT, file], capture_output=True, text=True, timeout=8 * PATIENCE)
    assert done.returncode == 0, done.stderr + server.log_text()[-2000:]
    return json.loads(done.stdout)


def test_every_node_is_known_and_drawn(page):
    wanted = sorted(node["type"] for node in json.loads(WORKFLOW.read_text())["nodes"])
    assert sorted(node["type"] for node in page["nodes"]) == wanted
    assert [node["type"] for node in page["nodes"] if not node["known"]] == []


def test_our_nodes_show_their_inputs(page):
    ours = {node["type"]: node["widgets"] for node in page["nodes"] if node["type"].startswith("SVDQuant")}
    assert "SVDQuantLoadModel" in ours
    assert all(widgets for node, widgets in ours.items() if node != "SVDQuantDemoVAE"), ours


def test_the_page_queues_it_and_shows_the_picture(page, server):
    assert page["status"] == "success", page["messages"]
    picture = server.client.view(page["images"][0])
    assert picture.startswith(b"\x89PNG")
    assert page["shown"] >= 1


def test_reports_are_shown_on_their_nodes(page):
    shown = {node["type"]: " ".join(map(str, node["values"])) for node in page["after"]}
    assert " s in all" in shown["SVDQuantSample"], shown
    assert "12 layers of 36 tensors" in shown["SVDQuantApplyLora"], shown


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: file.stem)
def test_every_template_opens_with_its_values(page, file):
    """No node is missing, and the page reads each widget's value from its place."""
    wanted = {node["title"]: node for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]}
    drawn = {node["title"]: node for node in page["others"][str(file)]}
    assert set(drawn) == set(wanted)
    assert [title for title, node in drawn.items() if not node["known"]] == []
    for title, node in wanted.items():
        stored = node["widgets_values"]
        assert drawn[title]["values"][: len(stored)] == stored, title


def test_the_page_reports_no_error(page):
    assert page["errors"] == []


def test_screenshot_is_kept(page):
    assert SCREENSHOT.read_bytes().startswith(b"\x89PNG") and SCREENSHOT.stat().st_size > 20_000
