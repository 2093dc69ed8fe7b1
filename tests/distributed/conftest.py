"""A trained model's checkpoint, which tests only read."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharded_models import trained_old
from torch.distributed.checkpoint.state_dict import get_state_dict
from worlds import save_alone


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, optimizer = trained_old()
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    return save_alone(state | {"epoch": 3}, tmp_path_factory.mktemp("trained") / "old")
