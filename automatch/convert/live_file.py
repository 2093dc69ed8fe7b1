"""torch output of a checkpoint that is in memory already: its own objects, saved by torch itself."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

from automatch.apply import convert
from automatch.convert.content import Content
from automatch.convert.plan import Planned
from automatch.errors import CheckpointError
from automatch.mapping import KeyMapping
from automatch.readers import OpenCheckpoint
from automatch.readers._live import LiveNode
from automatch.readers._unwrap import JOINED


def write_live(path: Path, plan: Sequence[Planned], mapping: KeyMapping, source: OpenCheckpoint, content: Content) -> tuple[str, ...]:
    """Write a loaded checkpoint with its weights under their new keys.

    Returns:
        The path of dict keys to the weights in it.

    Raises:
        CheckpointError: torch cannot write it.
    """
    import torch

    state: OrderedDict[Any, Any] = OrderedDict(convert([item.match for item in plan], source, mapping.target.spec))
    joined = source.spec.wrapper[-1:] == (JOINED,)
    root = state if joined else with_state(source.tree, source.spec.wrapper, state)
    try:
        with path.open("xb") as file:
            torch.save(root, file)
            file.flush()
            os.fsync(file.fileno())
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"torch cannot write {path.name!r}: {error}") from error
    for item in plan:
        content.tick(item.nbytes)
    return () if joined else source.spec.wrapper


def with_state(node: Any, path: tuple[str, ...], state: OrderedDict[Any, Any]) -> Any:
    """The content with other weights at ``path``; only the containers on the way are copied."""
    if not path:
        others = cast("Mapping[Any, Any]", node)
        kept = {key: value for key, value in others.items() if LiveNode.tensor(value, str(key), "the checkpoint") is None}
        state.update({key: value for key, value in kept.items() if key not in state})
        return state
    head, rest = path[0], path[1:]
    if isinstance(node, list | tuple):
        items = list(cast("Sequence[Any]", node))
        items[int(head)] = with_state(items[int(head)], rest, state)
        return items if isinstance(node, list) else tuple(items)
    changed = copy(node)
    changed[head] = with_state(changed[head], rest, state)
    return changed
