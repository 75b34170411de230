"""Write every file of workflows/: one description, two forms, a page about them, and small pictures of the graphs.

    python tools/make_workflows.py            # with the Python of .venv; starts the ComfyUI of .hosts

`workflows/api/NAME.json` is what the headless API takes; `workflows/NAME.json` is the graph the web UI opens, and
`workflows/NAME.jpg` its picture in the list of templates. The descriptions are in tools/workflows/.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pack

pack.alias()
from svdquant_nodes.tools.host import places
from svdquant_nodes.tools.host.server import ComfyServer
from svdquant_nodes.tools.workflows import WORKFLOWS, draw, page, thumbnail

OUT = pack.ROOT / "workflows"


def write(path: Path, graph: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(pack.ROOT))


def main() -> None:
    """Start a host, ask it for the nodes' signatures, write the files."""
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else places.tree_dir(places.NEWEST)
    host = places.host_at(tree, Path(sys.executable))
    with tempfile.TemporaryDirectory() as base, ComfyServer(host, Path(base)) as server:
        info = server.client.get("/object_info")
    for workflow in WORKFLOWS:
        write(OUT / "api" / f"{workflow.name}.json", draw.api_form(workflow))
        drawn = draw.ui_form(workflow, info)
        write(OUT / f"{workflow.name}.json", drawn)
        thumbnail.save(drawn, workflow, OUT / f"{workflow.name}.jpg")
    (OUT / "README.md").write_text(page.text(WORKFLOWS), encoding="utf-8")


if __name__ == "__main__":
    main()
