from __future__ import annotations

import pytest

from svdquant_nodes.tests.adapters.baking import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy checkpoint with the branches that the LoRA goldens were made on, and their LoRAs."""
    return toy.make(tmp_path_factory.mktemp("bake"))
