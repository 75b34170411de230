"""What every node says, to the page and to the log, and what it asks of its files before a graph runs."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
from comfy_execution.utils import CurrentNodeContext

from svdquant_nodes.nodes.checked import checked
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


def refusing(name):
    if name.startswith("bad"):
        raise ValueError(f"{name}: expected a model, got none")


CHECKED = {  # names -> the answer
    "one": (("good",), True),
    "none-yet": ((None,), True),
    "no-names": ((), True),
    "a-bad-one-behind": ((None, "good", "bad-1", "bad-2"), "bad-1: expected a model, got none"),
}


@pytest.mark.parametrize(("names", "answer"), CHECKED.values(), ids=CHECKED)
def test_files_are_refused_in_the_words_of_their_check(names, answer):
    assert checked(refusing, *names) == answer


def test_what_is_no_refusal_is_raised():
    """A mistake of ours is not told as if it were the user's."""
    with pytest.raises(KeyError):
        checked({}.__getitem__, "name")
