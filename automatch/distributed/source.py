"""What a checkpoint that ranks share holds: its model's tensors, its optimizer's groups, and the mapping given for it."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from automatch.distributed.entries import sections
from automatch.distributed.storage import Reader
from automatch.errors import CheckpointError, LoadError, UnsafeCheckpointError
from automatch.mapping import KeyMapping
from automatch.specs import StateSpec, TensorSpec, dtype_name

_PREFERRED = ("model", "state_dict", "module")


def given_mapping(mapping: KeyMapping | str | os.PathLike[str] | None) -> KeyMapping | None:
    """A mapping, or that of a file."""
    return mapping if isinstance(mapping, KeyMapping) or mapping is None else KeyMapping.load(Path(mapping))


def spec_of_metadata(metadata: Metadata, origin: str, prefix: str | None = None) -> StateSpec:
    """Describe the model's tensors of a checkpoint.

    Args:
        metadata: what the checkpoint holds.
        origin: its path, for messages.
        prefix: the flat prefix of the model's keys; None finds the part that is not an optimizer's.

    Raises:
        CheckpointError: there are several parts that may be the model.
    """
    tensors = {key: md for key, md in metadata.state_dict_metadata.items() if isinstance(md, TensorStorageMetadata)}
    wrapper: tuple[str, ...] = ()
    if prefix is None:
        wrapper = _wrapper(metadata, tensors, origin)
        prefix = "".join(f"{part}." for part in wrapper)
    else:
        wrapper = tuple(part for part in (prefix.rstrip("."),) if part)
    planned: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    specs = tuple(
        TensorSpec(key[len(prefix) :], tuple(md.size), dtype_name(md.properties.dtype))
        for key, md in tensors.items()
        if key.startswith(prefix) and not _of_optimizer(planned.get(key, ()))
    )
    return StateSpec(specs, origin, wrapper)


def _of_optimizer(path: tuple[Any, ...]) -> bool:
    return "state" in path[:-1] or "param_groups" in path[:-1]


def _wrapper(metadata: Metadata, tensors: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    planned: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    paths = [tuple(map(str, planned.get(key, (key,)))) for key in tensors]
    paths = [path for path in paths if not _of_optimizer(path)]
    wrapper: tuple[str, ...] = ()
    while paths and all(len(path) > len(wrapper) + 1 for path in paths):
        heads = list(dict.fromkeys(path[len(wrapper)] for path in paths))
        head = heads[0] if len(heads) == 1 else next((name for name in _PREFERRED if name in heads), None)
        if head is None:
            raise CheckpointError(
                f"{origin} holds {', '.join(map(repr, heads))}; which is the model? Pass a mapping whose source names the keys"
            )
        wrapper = (*wrapper, head)
        paths = [path for path in paths if path[: len(wrapper)] == wrapper]
    return wrapper


def dcp_load(state_dict: dict[str, Any], reader: Reader, planner: LoadPlanner) -> None:
    """`torch.distributed.checkpoint.load` for this rank alone: reading needs no other rank, and planning no rank 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            load(state_dict, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise error.failures[0][0] from error


class _ObjectPlanner(DefaultLoadPlanner):
    def __init__(self, trust: bool) -> None:
        super().__init__(flatten_state_dict=False)
        self._trust = trust

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        try:
            self.original_state_dict[key] = torch.load(value, weights_only=not self._trust)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(f"entry {key!r} was not read: {error}; pass trust=True if you know who wrote it") from error


def read_objects(reader: Reader, keys: Sequence[str], *, trust: bool = False) -> dict[str, Any]:
    """Unpickle non-tensor entries, by their flat keys; nothing is executed unless ``trust`` is set."""
    objects: dict[str, Any] = dict.fromkeys(keys)
    if objects:
        dcp_load(objects, reader, _ObjectPlanner(trust))
    return objects


def match_groups(mapping: KeyMapping, target: Mapping[str, Any], reader: Reader, *, trust: bool = False) -> dict[int, int] | None:
    """For each parameter group of the target's optimizer, the checkpoint's group that holds its parameters' sources.

    Args:
        mapping: which keys feed which.
        target: the flat target state_dict.
        reader: the checkpoint.
        trust: allow unpickling arbitrary code.

    Returns:
        None when the target or the checkpoint lists no groups.

    Raises:
        LoadError: a group's parameters come from several groups of the checkpoint.
    """
    own = _group_keys(target)
    theirs = _group_keys(reader.read_metadata().state_dict_metadata)
    if not own or not theirs:
        return None
    lists = read_objects(reader, list(theirs.values()), trust=trust)
    home = {key: number for number, name in theirs.items() for key in lists[name]}
    groups: dict[int, int] = {}
    for number, name in own.items():
        matches = (match for key in target[name] if (match := mapping.get(key)) is not None)
        found = sorted({home[source] for match in matches for source in match.sources if source in home})
        if len(found) > 1:
            raise LoadError(
                f"parameter group {number} of the optimizer takes parameters of the checkpoint's groups {found}; "
                "group the optimizer's parameters like the checkpoint's"
            )
        if found:
            groups[number] = found[0]
    return groups


def _group_keys(flat: Mapping[str, Any]) -> dict[int, str]:
    found: dict[int, str] = {}
    for key in flat:
        if key.endswith(".params"):
            for _, rest in sections(key, "param_groups"):
                if rest.partition(".")[0].isdigit():
                    found[int(rest.partition(".")[0])] = key
    return found
