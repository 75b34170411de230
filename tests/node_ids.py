"""The ids of our nodes. They are saved in users' workflows: one that leaves this list breaks their files."""

from __future__ import annotations

import ast

from svdquant_nodes.tools.pack import ROOT

NODE_IDS = {
    "SVDQuantLoadModel",
    "SVDQuantLoadTextEncoder",
    "SVDQuantApplyLora",
    "SVDQuantBakeLora",
    "SVDQuantSample",
    "SVDQuantInspect",
    "SVDQuantFetchModel",
    "SVDQuantCalibrate",
    "SVDQuantQuantize",
    "SVDQuantQuantizeTextEncoder",
    "SVDQuantCompare",
    "SVDQuantDemoPrompt",
    "SVDQuantDemoVAE",
}


def declared_ids() -> set[str]:
    """The node_id of every schema in nodes/, read without importing them."""
    trees = (ast.parse(file.read_text()) for file in (ROOT / "nodes").glob("*.py"))
    words = (word for tree in trees for word in ast.walk(tree) if isinstance(word, ast.keyword))
    return {
        word.value.value for word in words if word.arg == "node_id" and isinstance(word.value, ast.Constant)
    }
