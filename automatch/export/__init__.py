"""A mapping as code for the tools that people load checkpoints with already; none of it needs automatch."""

from __future__ import annotations

from collections.abc import Callable

from automatch.errors import MappingError
from automatch.export._hooks import on_load_checkpoint, pre_hook
from automatch.export._regex import key_mapping, revise_keys
from automatch.export._script import script
from automatch.export._transformers import weight_conversions
from automatch.mapping import KeyMapping

KINDS: dict[str, Callable[[KeyMapping], str]] = {
    "script": script,
    "revise_keys": revise_keys,
    "key_mapping": key_mapping,
    "weight_conversions": weight_conversions,
    "pre_hook": pre_hook,
    "on_load_checkpoint": on_load_checkpoint,
}


def export_mapping(mapping: KeyMapping, kind: str) -> str:
    """The mapping as source text of one kind (a key of `KINDS`); every match of it, whatever its confidence.

    Raises:
        MappingError: there is no such kind, or it cannot say what the mapping says.
    """
    if kind not in KINDS:
        raise MappingError(f"no export kind {kind!r}; there are: {', '.join(KINDS)}")
    return KINDS[kind](mapping)
