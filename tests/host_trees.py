"""Which ComfyUI trees the host tests run on, newest first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from svdquant_nodes.tools.host import places
from svdquant_nodes.tools.host.places import Host


def host_trees() -> list[Host]:
    """Those of SVDQUANT_HOSTS, else the one of COMFYUI_PATH, else what the set-up has unpacked."""
    users = places.users_host()
    if paths := os.environ.get("SVDQUANT_HOSTS"):
        python = Path(os.environ.get("SVDQUANT_HOST_PYTHON") or sys.executable)
        return [places.host_at(Path(path), python) for path in paths.split(os.pathsep)]
    if users:
        return [users]
    trees = [places.tree_dir(version) for version in (places.NEWEST, places.OLDEST)]
    return [places.host_at(tree, Path(sys.executable)) for tree in trees if tree.is_dir()]
