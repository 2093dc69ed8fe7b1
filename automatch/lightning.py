"""PyTorch Lightning: `load_from_checkpoint`, the callbacks `AutoMatch` and `SaveSnapshot`, `AutoMatchMixin`, and Fabric's `load`."""

from __future__ import annotations

from automatch.integrations.fabric import fabric_load
from automatch.integrations.lightning import AutoMatch, AutoMatchMixin, SaveSnapshot, load_from_checkpoint

__all__ = ["AutoMatch", "AutoMatchMixin", "SaveSnapshot", "fabric_load", "load_from_checkpoint"]
