"""Loading and converting across ranks, through torch.distributed.checkpoint; names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automatch.distributed.conversion import ConversionReport, convert
    from automatch.distributed.crew import RankLostError
    from automatch.distributed.loading import DistributedReport, load
    from automatch.distributed.planner import MappedLoadPlanner
    from automatch.distributed.reads import WholeRead

_HOME_OF = {
    "ConversionReport": "conversion",
    "DistributedReport": "loading",
    "MappedLoadPlanner": "planner",
    "RankLostError": "crew",
    "WholeRead": "reads",
    "convert": "conversion",
    "load": "loading",
}

__all__ = ["ConversionReport", "DistributedReport", "MappedLoadPlanner", "RankLostError", "WholeRead", "convert", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'automatch.distributed' has no attribute {name!r}")
    value = getattr(import_module(f"automatch.distributed.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
