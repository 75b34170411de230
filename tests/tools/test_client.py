"""Workflows that are sent to a host: only API form is, and the rest is told apart before a host starts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from svdquant_nodes.tools.host.client import read_prompt
from svdquant_nodes.tools.host.places import ROOT


def test_api_form_is_read():
    file = ROOT / "workflows" / "api" / "demo.json"
    assert read_prompt(file) == json.loads(file.read_text())


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ((ROOT / "workflows" / "demo.json").read_text(), "a workflow as the page saves it"),
        ("{}", "something else"),
        ("[1]", "something else"),
        ('{"1": 2}', "something else"),
        ("\x89PNG", "something else"),
    ],
    ids=["page", "empty", "list", "numbers", "picture"],
)
def test_anything_else_is_refused(tmp_path, text, got):
    (tmp_path / "flow.json").write_text(text)
    with pytest.raises(ValueError, match=f"flow.json: expected a workflow in API form, got {got}"):
        read_prompt(tmp_path / "flow.json")


def test_the_demo_says_so_before_it_sets_anything_up():
    command = [sys.executable, ROOT / "tools" / "demo", "--workflow", ROOT / "workflows" / "demo.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stdout == ""
    assert "expected a workflow in API form" in done.stderr and done.stderr.count("\n") == 1
