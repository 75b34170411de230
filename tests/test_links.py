"""Links and paths in the texts lead to files, the documents' example is real, and the README lists what can be set."""

from __future__ import annotations

import re

import pytest

from svdquant_nodes.tools.pack import ROOT

TEXTS = sorted(
    file for pattern in ("*.md", "docs/*.md", "web/docs/**/*.md", "demo/*.md") for file in ROOT.glob(pattern)
)
README = ROOT / "README.md"

# Variables with which our own processes tell each other something -> who tells whom; nobody sets them by hand.
BETWEEN_PROCESSES = {
    "SVDQUANT_HOSTS": "tools/test tells pytest which ComfyUI trees there are",
    "SVDQUANT_HOST_PYTHON": "and the Python that runs them",
    "SVDQUANT_INSIDE_TREE": "tests/host/test_inside.py tells the pytest it starts in a ComfyUI",
    "SVDQUANT_RUNS_IN": "a command tells itself that it has been started again in its environment",
    "SVDQUANT_STARTED": "and when it began",
    "SVDQUANT_STOP_WITH_STDIN": "a test tells the ComfyUI it starts to end with it",
}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """A text without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def broken_links(path):
    """Relative links of a text that lead to no file, or to no heading of one."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", prose(path)):
        target, _, anchor = "".join(link).partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (path.parent / target) if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append("".join(link))
    return broken


def anchors(path):
    """The names by which a Markdown file's headings can be linked."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_relative_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# The `one` heading\n")
    (tmp_path / "a.md").write_text(
        '[x](b.md) [x](c.md) [x](b.md#the-one-heading) [x](b.md#no) [x](https://a.b/c) <img src="d.png">'
    )
    assert broken_links(tmp_path / "a.md") == ["c.md", "b.md#no", "d.png"]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=relative)
def test_paths_in_the_documents_exist(path):
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and folder.name[0] != "."}
    quoted = re.findall(r"`([\w.-]+/[\w./*-]*)`", prose(path))
    assert [name for name in quoted if name.split("/")[0] in folders and not list(ROOT.glob(name))] == []


def variables_in_the_code():
    """Every SVDQUANT_ variable that a script, a test or the pack names in quotes or reads in a shell."""
    folders = ("nodes", "loaders", "svdquant", "tools", "tests", "benchmarks", ".ci")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    found = set()
    for file in files:
        if file.suffix in (".py", ".sh", "") and file.name != "test_links.py":
            found |= set(re.findall(r"[\"'{](SVDQUANT_[A-Z_]+)", file.read_text(encoding="utf-8")))
    return found


def test_readme_lists_every_variable():
    listed = {
        name
        for line in README.read_text().splitlines()
        if line.startswith("|")
        for name in re.findall(r"`(\w+)`", line)
    }
    assert variables_in_the_code() - BETWEEN_PROCESSES.keys() - listed == set()


def test_variables_between_processes_are_still_read():
    assert variables_in_the_code() >= BETWEEN_PROCESSES.keys()


def test_the_example_is_the_packs_own_table():
    text = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    table = ROOT / "svdquant" / "adapters" / "families" / "pixart_sigma.py"
    assert table.read_text(encoding="utf-8") in blocks
