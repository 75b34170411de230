"""Every workflow's API form passes the validation of a real ComfyUI, with the demo's files in place of the models.

The files are made from what the page form offers to download, so a model that it forgets is refused here.
"""

from __future__ import annotations

import json
import shutil
import time

import pytest

from svdquant_nodes.tools.host.client import PromptRefused
from svdquant_nodes.tools.host.places import ROOT
from svdquant_nodes.tools.workflows import WORKFLOWS, draw

# What our nodes look into before the graph runs; other nodes' files are empty.
STAND_INS = {
    "SVDQuantLoadModel": "diffusion_models/svdquant-demo-int4.safetensors",
    "UNETLoader": "diffusion_models/svdquant-demo-bf16.safetensors",
    "SVDQuantQuantize": "diffusion_models/svdquant-demo-bf16.safetensors",
    "SVDQuantQuantizeTextEncoder": "diffusion_models/svdquant-demo-bf16.safetensors",
    "SVDQuantApplyLora": "loras/svdquant-demo-lora.safetensors",
}


@pytest.fixture(scope="module")
def with_files(comfy):
    """The host with a file of every name that a workflow loads, all of them empty."""
    made = {path for workflow in WORKFLOWS for path, _ in files(comfy, workflow) if not path.exists()}
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    image = comfy.base_dir / "input" / "example.png"
    shutil.copy(comfy.server.host.tree / "input" / "example.png", image)
    yield comfy
    for path in (*made, image):
        path.unlink()


def files(comfy, workflow):
    """What a workflow loads, and the nodes that do."""
    drawn = json.loads((ROOT / "workflows" / f"{workflow.name}.json").read_text(encoding="utf-8"))
    models = comfy.base_dir / "models"
    for node in drawn["nodes"]:
        for model in node["properties"].get("models", ()):
            yield models / model["directory"] / model["name"], node["type"]
    for name, _ in workflow.made:
        yield models / "diffusion_models" / name, "SVDQuantLoadModel"
        yield models / "text_encoders" / name, "SVDQuantLoadTextEncoder"


@pytest.fixture
def with_stand_ins(with_files, workflow):
    """What this workflow's nodes look into; another workflow's node may want the same file empty."""
    wanted = ((path, STAND_INS.get(node)) for path, node in files(with_files, workflow))
    stand_ins = {path: demo for path, demo in wanted if demo and not path.stat().st_size}
    for path, demo in stand_ins.items():
        shutil.copy(ROOT / "demo" / demo, path)
    yield with_files
    for path in stand_ins:
        path.unlink()  # and not emptied: the host may still have it mapped
        path.touch()


def wait_for(comfy, number):
    deadline = time.monotonic() + 120
    while comfy.client.history(number) is None:
        assert time.monotonic() < deadline, "the prompt did not end"
        time.sleep(0.1)
    return comfy.client.history(number)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_workflow_is_accepted(with_stand_ins, workflow):
    """It runs to its end, or to the first node that opens a file: those are there by name only."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{workflow.name}.json").read_text(encoding="utf-8"))
    number = with_stand_ins.client.queue(prompt)  # raises PromptRefused
    messages = wait_for(with_stand_ins, number)["status"]["messages"]
    stopped = [told["node_type"] for event, told in messages if event == "execution_error"]
    assert len(stopped) == (workflow.name != "demo"), stopped
    assert all("Load" in node or node == "SVDQuantQuantizeTextEncoder" for node in stopped), stopped


@pytest.fixture(scope="module")
def object_info(comfy):
    return comfy.client.get("/object_info")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_the_page_form_fits_this_host(object_info, workflow):
    """Values stand where this version of each node looks for them; its page reads them by position alone."""
    there = json.loads((ROOT / "workflows" / f"{workflow.name}.json").read_text(encoding="utf-8"))
    here = draw.ui_form(workflow, object_info)
    assert there["links"] == here["links"]
    for one, other in zip(there["nodes"], here["nodes"], strict=True):
        for what in ("type", "inputs", "widgets_values"):
            assert one[what] == other[what], one["title"]


def test_a_model_that_is_missing_is_refused_by_name(comfy):
    prompt = json.loads((ROOT / "workflows" / "api" / "flux1-dev.json").read_text(encoding="utf-8"))
    prompt["1"]["inputs"]["model_name"] = "not-here.safetensors"
    with pytest.raises(PromptRefused, match=r"SVDQuantLoadModel: .*not-here\.safetensors"):
        comfy.client.run(prompt)
