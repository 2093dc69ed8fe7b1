"""automatch: this checkpoint does not load into this model; which tensor goes where?

Names are imported on first use, so that ``import automatch`` costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automatch.checking import check
    from automatch.errors import (
        AutomatchError,
        CheckpointError,
        LoadError,
        MappingError,
        MissingExtraError,
        ModelError,
        TransformError,
        UnsafeCheckpointError,
    )
    from automatch.load import LoadReport, load
    from automatch.mapping import KeyMapping, Match, Question, Verdict
    from automatch.matching import propose_mapping
    from automatch.migrations import accept
    from automatch.optimizer import remap_optimizer_state
    from automatch.readers import open_checkpoint
    from automatch.snapshot import Snapshot, read_snapshot, save_snapshot, snapshot
    from automatch.specs import StateSpec, TensorSpec

__version__ = "0.1.0"

_HOMES = {
    "automatch.checking": ("check",),
    "automatch.errors": (
        "AutomatchError",
        "CheckpointError",
        "LoadError",
        "MappingError",
        "MissingExtraError",
        "ModelError",
        "TransformError",
        "UnsafeCheckpointError",
    ),
    "automatch.load": ("LoadReport", "load"),
    "automatch.mapping": ("KeyMapping", "Match", "Question", "Verdict"),
    "automatch.matching": ("propose_mapping",),
    "automatch.migrations": ("accept",),
    "automatch.optimizer": ("remap_optimizer_state",),
    "automatch.readers": ("open_checkpoint",),
    "automatch.snapshot": ("Snapshot", "read_snapshot", "save_snapshot", "snapshot"),
    "automatch.specs": ("StateSpec", "TensorSpec"),
}
# Modules that are reached as attributes, e.g. automatch.lightning, and imported on first use too.
_SUBMODULES = ("lightning",)
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AutomatchError",
    "CheckpointError",
    "KeyMapping",
    "LoadError",
    "LoadReport",
    "MappingError",
    "Match",
    "MissingExtraError",
    "ModelError",
    "Question",
    "Snapshot",
    "StateSpec",
    "TensorSpec",
    "TransformError",
    "UnsafeCheckpointError",
    "Verdict",
    "accept",
    "check",
    "load",
    "open_checkpoint",
    "propose_mapping",
    "read_snapshot",
    "remap_optimizer_state",
    "save_snapshot",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"automatch.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'automatch' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps a public name that is also a submodule's, such as `load`, when the import system puts the submodule there."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in _HOME_OF else value)


sys.modules[__name__].__class__ = _Package
