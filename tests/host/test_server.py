"""The pack in a running ComfyUI: it loads fast and clean, and every node can be asked for."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from svdquant_nodes.tests.node_ids import NODE_IDS, declared_ids
from svdquant_nodes.tools.host.client import PromptFailed, PromptRefused
from svdquant_nodes.tools.host.places import ROOT

WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))


@pytest.fixture(scope="module")
def object_info(comfy):
    return comfy.client.get("/object_info")


def test_every_node_is_listed(object_info):
    ours = {name for name in object_info if name.startswith("SVDQuant")}
    assert ours == NODE_IDS == declared_ids()


@pytest.mark.parametrize("node", sorted(NODE_IDS))
def test_inputs_have_tooltips(object_info, node):
    sections = object_info[node]["input"]
    inputs = {**sections.get("required", {}), **sections.get("optional", {})}
    without = [name for name, (_, *options) in inputs.items() if not (options and options[0].get("tooltip"))]
    assert without == []


@pytest.mark.parametrize("node", sorted(NODE_IDS))
def test_node_says_what_it_is(object_info, node):
    info = object_info[node]
    assert info["description"] and info["category"].lower().startswith("svdquant")


def test_import_is_quick_and_touches_no_gpu(host):
    """The quickest of up to three starts, since whatever else the machine does can only add to one."""
    quickest = math.inf
    for _ in range(3):
        said = imported(host)
        assert not said["cuda"]
        quickest = min(quickest, said["seconds"])
        if quickest < 0.5:
            return
    pytest.fail(f"the import takes {quickest:.2f} s, expected less than 0.5")


def imported(host):
    script = Path(__file__).with_name("import_pack.py")
    done = subprocess.run([host.python, script, host.tree], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_clean(comfy):
    [failed] = re.findall(r"[\d.]+ seconds( \(IMPORT FAILED\))?: \S*svdquant-nodes", comfy.server.log_text())
    assert not failed


def test_the_pack_is_in_no_traceback_of_the_start(comfy):
    start = comfy.server.log_text().partition("To see the GUI go to")[0]
    assert "svdquant-nodes/" not in start


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_workflow_names_nodes_of_this_host(object_info, workflow):
    classes = {node["class_type"] for node in json.loads(workflow.read_text()).values()}
    assert classes <= set(object_info)


def test_help_page_is_served(comfy, object_info):
    folder = object_info["SVDQuantLoadModel"]["python_module"].rpartition(".")[2]
    for node in NODE_IDS:
        page = comfy.client.fetch(f"/extensions/{folder}/docs/{node}.md")
        assert len(page) > 100


PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 1, "color": 0xFF}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}},
}


def test_client_follows_a_prompt_to_its_picture(comfy):
    result = comfy.client.run(PICTURE)
    [image] = result.images()
    assert comfy.client.view(image).startswith(b"\x89PNG")
    assert (comfy.base_dir / "output" / image["filename"]).is_file()
    assert result.events[-1].kind == "execution_success"


def test_client_names_the_refused_input(comfy):
    wrong = {
        **PICTURE,
        "1": {"class_type": "EmptyImage", "inputs": {**PICTURE["1"]["inputs"], "width": "wide"}},
    }
    with pytest.raises(PromptRefused, match=r"EmptyImage: .*width, wide"):
        comfy.client.run(wrong)
    comfy.client.run(PICTURE)


def test_client_runs_no_part_of_a_prompt(comfy):
    """The host by itself leaves out the pictures that cannot be made."""
    half = {**PICTURE, "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}
    with pytest.raises(PromptRefused, match=r"SaveImage: .*filename_prefix"):
        comfy.client.run(half)
    comfy.client.run(PICTURE)


def test_client_names_the_failed_node(comfy):
    outside = {
        **PICTURE,
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../x"}},
    }
    with pytest.raises(PromptFailed, match=r"SaveImage: .*outside the output folder"):
        comfy.client.run(outside)
    comfy.client.run(PICTURE)
