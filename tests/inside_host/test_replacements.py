"""What old workflows are offered: nodes that exist, with inputs of that name."""

from __future__ import annotations

import asyncio

import pytest

from svdquant_nodes import nodes
from svdquant_nodes.nodes.replacements import REPLACEMENTS


@pytest.fixture(scope="module")
def inputs():
    """Our nodes and the ids of their inputs."""
    listed = asyncio.run(nodes.SVDQuantExtension().get_node_list())
    schemas = [node.define_schema() for node in listed]
    return {schema.node_id: {one.id for one in schema.inputs} for schema in schemas}


@pytest.mark.parametrize("old", REPLACEMENTS)
def test_replacement_has_the_inputs_that_are_mapped(inputs, old):
    new, widgets, mapping = REPLACEMENTS[old]
    assert set(mapping) <= inputs[new]
    linked = {"model"}  # an input that is no widget
    assert set(mapping.values()) <= {*widgets, *linked}
