"""The exceptions of automatch; each message names the key or file, both values and the next step."""

from __future__ import annotations


class AutomatchError(Exception):
    """Base class of every error that automatch raises on purpose."""


class CheckpointError(AutomatchError):
    """A checkpoint cannot be read: missing, truncated, hostile, or not a checkpoint at all."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the checkpoint would execute code; only `trust=True` allows that."""


class MissingExtraError(CheckpointError, ImportError):
    """A format needs an optional package that is not installed; the message names the install command."""


class ModelError(AutomatchError):
    """The model cannot be described, e.g. it has uninitialised (lazy) parameters."""


class MappingError(AutomatchError):
    """A mapping is malformed, or does not belong to the model or checkpoint it is used with."""


class TransformError(AutomatchError):
    """A transform does not fit the shapes it is applied to."""


class LoadError(AutomatchError):
    """Loading was refused; the model is unchanged."""
