"""A checkpoint whose layers do not all fill the blocks of int4."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def uneven_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """Layers of 64 inputs, and of 112 and 72: the last of every MLP."""
    text = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 112}
    widths = {"hidden_size": 64, "intermediate_size": 72, "out_hidden_size": 64}
    vision = {"depth": 1, "deepstack_visual_indexes": [0], **widths}
    return Path(make_checkpoint(tmp_path_factory.mktemp("uneven") / "checkpoint", text, vision))
