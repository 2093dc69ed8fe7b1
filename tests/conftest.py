"""Settings for all tests: seeded, one thread, no deadlines, no colour and no ranks from the outside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("automatch", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=False)
settings.load_profile("automatch")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
