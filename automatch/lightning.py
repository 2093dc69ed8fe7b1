"""PyTorch Lightning: `load_from_checkpoint`, the callback and mixin `AutoMatch`, and Fabric's `load`."""

from __future__ import annotations

from automatch.integrations.lightning import AutoMatch, AutoMatchMixin, fabric_load, load_from_checkpoint

__all__ = ["AutoMatch", "AutoMatchMixin", "fabric_load", "load_from_checkpoint"]
