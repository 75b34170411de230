"""What every node says, to the page and to the log."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
from comfy_execution.utils import CurrentNodeContext

from svdquant_nodes.nodes.reported import reported


@pytest.fixture
def page(monkeypatch):
    """What a page is sent: (text, number of a node)."""
    sent = []
    server = SimpleNamespace(send_progress_text=lambda *words: sent.append(words))
    there = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", there)
    return sent


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="svdquant-nodes")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_running_node_shows_its_text(page, said):
    with CurrentNodeContext("a-prompt", "7"):
        made = reported(1, "two", text="32 layers")
    assert made.args == (1, "two") and made.ui.as_dict() == {"text": ("32 layers",)}
    assert page == [("32 layers", "7")] and said() == []


def test_a_node_that_is_called_from_python_sends_nothing(page, said):
    made = reported(text="32 layers", event="wrote a file")
    assert made.args == () and made.ui.as_dict() == {"text": ("32 layers",)}
    assert page == [] and said() == ["SVDQuant: wrote a file"]
