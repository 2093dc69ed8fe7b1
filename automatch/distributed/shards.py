"""What a conversion writes: every entry under its new key, packed into shards that ranks write one by one."""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from automatch.distributed.entries import EXTRA, Entries, Entry, find_entries, find_source_prefix, sections
from automatch.errors import MappingError, TransformError
from automatch.mapping import KeyMapping
from automatch.readers._dtypes import TO_SAFETENSORS
from automatch.specs import dtype_name
from automatch.transforms import Copy, output_shape

Format = Literal["safetensors", "dcp"]
PORTION_BYTES = 16 * 10**6  # more of it costs more: memory is fetched anew, and does not stay in the cache


@dataclass(frozen=True, slots=True)
class Output:
    """One entry that is written.

    Args:
        key: its flat key.
        path: its place in the nested state_dict.
        shape: its shape; None for an object.
        dtype: its dtype; None for an object.
    """

    key: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor; 0 for an object."""
        return 0 if self.shape is None or self.dtype is None else torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A whole conversion; the same on every rank and in every run, whatever the number of ranks.

    Args:
        shards: what each shard holds, in order.
        entries: what feeds each entry.
        renamed_lists: for the flat key of a list of parameters, the list under the new keys is to be written.
        left_out: the checkpoint's entries that the output format cannot hold, or that the mapping does not use.
        digest: of what is written and how, by which an unfinished conversion is known again.
        checkpoint: of what is read, and of when that was written.
    """

    shards: tuple[tuple[Output, ...], ...]
    entries: Entries
    renamed_lists: frozenset[str]
    left_out: tuple[str, ...]
    digest: str
    checkpoint: str

    def nbytes(self, shard: int) -> int:
        """Bytes of a shard's tensors."""
        return sum(output.nbytes for output in self.shards[shard])


def plan_conversion(mapping: KeyMapping, metadata: Metadata, to: Format, max_shard_bytes: int, checkpoint: str) -> Plan:
    """Lay out a conversion.

    Args:
        mapping: which keys feed which.
        metadata: what the checkpoint holds.
        to: the output format.
        max_shard_bytes: the largest shard, in bytes; a larger tensor has a shard to itself.
        checkpoint: a digest of it, and of when it was written.

    Raises:
        MappingError: the mapping's keys are not in the checkpoint, or do not fit, or the format has no such dtype.
    """
    prefix = find_source_prefix(mapping, metadata)
    targets, lists = _targets(mapping, metadata, prefix if to == "dcp" else "", to)
    groups = {number: number for number in range(len(lists))}
    entries = find_entries(mapping, targets, metadata, groups, prefix)
    if entries.missing:
        raise MappingError(f"nothing in the checkpoint feeds {entries.missing[0]!r}, and a converted checkpoint has no initial values")
    outputs = [_output(entry, targets[entry.target], metadata) for entry in entries.fed]
    outputs += [Output(key, targets[key]) for key in sorted(lists)]
    foreign = [output for output in outputs if output.dtype is not None and dtype_name(output.dtype) not in TO_SAFETENSORS]
    if to == "safetensors" and foreign:
        raise MappingError(f"{foreign[0].key!r} is {foreign[0].dtype}, which safetensors has not; write a dcp directory instead")
    used = {source for entry in entries.fed for source in entry.sources} | lists
    left_out = tuple(key for key in metadata.state_dict_metadata if key not in used)
    text = json.dumps([to, max_shard_bytes, [[e.target, e.sources, repr(e.transform)] for e in entries.fed]])
    digest = "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Plan(tuple(_packed(outputs, max_shard_bytes)), entries, frozenset(lists), left_out, digest, checkpoint)


def assign(sizes: Mapping[int, int], ranks: int) -> list[list[int]]:
    """Give shards to ranks so that all have about the same number of bytes to write, the largest first."""
    heap = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for shard in sorted(sizes, key=lambda shard: (-sizes[shard], shard)):
        load, rank = heapq.heappop(heap)
        shares[rank].append(shard)
        heapq.heappush(heap, (load + sizes[shard], rank))
    return shares


def renamed(keys: Sequence[str], mapping: KeyMapping) -> list[str]:
    """An optimizer's list of parameters under the model's keys, in its order; those that feed nothing are left out."""
    fed: dict[str, list[str]] = {}
    for match in mapping.matches:
        for source in match.sources:
            fed.setdefault(source, []).append(match.target)
    return list(dict.fromkeys(target for key in keys for target in fed.get(key, ())))


def _targets(mapping: KeyMapping, metadata: Metadata, prefix: str, to: Format) -> tuple[dict[str, tuple[str | int, ...]], set[str]]:
    """Flat key to path of everything that is written, and which of them are lists of parameters."""
    planned: Mapping[str, tuple[str | int, ...]] = metadata.planner_data or {}
    head = _head(mapping, planned, prefix)
    targets: dict[str, tuple[str | int, ...]] = {prefix + match.target: (*head, match.target) for match in mapping.matches}
    lists: set[str] = set()
    if to == "safetensors":
        return targets, lists
    by_first = _by_first_source(mapping)
    sources = {key for match in mapping.matches for key in match.sources}
    for key, stored in metadata.state_dict_metadata.items():
        path = planned.get(key, (key,))
        of_model = path[: len(head)] == head and key.startswith(prefix)
        module, dot, rest = key[len(prefix) :].partition(f".{EXTRA}")
        if of_model and dot:
            for name in _renamed_modules(mapping, module):
                place = (*head, f"{name}.{EXTRA}", *path[len(head) + 1 :])
                targets[f"{prefix}{name}.{EXTRA}{rest}"] = place
        elif of_model and len(path) == len(head) + 1 and (isinstance(stored, TensorStorageMetadata) or key[len(prefix) :] in sources):
            continue
        elif key.endswith(".params") and "param_groups" in path[:-1]:
            targets[key] = path
            lists.add(key)
        else:
            targets.update(_followers(key, path, by_first, sources))
    return targets, lists


def _renamed_modules(mapping: KeyMapping, module: str) -> list[str]:
    pairs = ((match.target.rpartition(".")[0], match.sources[0].rpartition(".")[0]) for match in mapping.matches if len(match.sources) == 1)
    return list(dict.fromkeys(target for target, source in pairs if source == module))


def _head(mapping: KeyMapping, planned: Mapping[str, tuple[str | int, ...]], prefix: str) -> tuple[str | int, ...]:
    first = next((prefix + source for match in mapping.matches for source in match.sources), "")
    path = planned.get(first, (first,))
    return path[:-1] if prefix else ()


def _by_first_source(mapping: KeyMapping) -> dict[str, list[str]]:
    targets: dict[str, list[str]] = {}
    for match in mapping.matches:
        targets.setdefault(match.sources[0], []).append(match.target)
    return targets


def _followers(
    key: str, path: tuple[str | int, ...], by_first: Mapping[str, list[str]], sources: set[str]
) -> dict[str, tuple[str | int, ...]]:
    """What an entry that no match names becomes: optimizer state under each target of its parameter, all else itself."""
    for section in ("state", "param_groups"):
        for head, rest in sections(key, section):
            owner = next((o for o in _heads(rest) if o in sources), None)
            if owner is None:
                continue
            field, top = rest[len(owner) :], tuple(head.split(".")[:-1])
            tail = tuple(field[1:].split("."))
            flat = len(path) <= len(top) + 1  # the flattened form keeps the whole key as one element
            return {
                f"{head}{section}.{target}{field}": (*path[:-1], f"{section}.{target}{field}") if flat else (*top, section, target, *tail)
                for target in by_first.get(owner, ())
            }
    return {key: path}


def _heads(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _output(entry: Entry, path: tuple[str | int, ...], metadata: Metadata) -> Output:
    stored = [metadata.state_dict_metadata[key] for key in entry.sources]
    tensors = [md for md in stored if isinstance(md, TensorStorageMetadata)]
    if any(isinstance(md, BytesStorageMetadata) for md in stored) or not tensors:
        return Output(entry.target, path)
    try:
        shape = output_shape(
            Copy() if entry.agree else entry.transform, [tuple(md.size) for md in (tensors[:1] if entry.agree else tensors)]
        )
    except TransformError as error:
        raise MappingError(f"what feeds {entry.target!r} does not fit: {error}") from error
    return Output(entry.target, path, shape, functools.reduce(torch.promote_types, (md.properties.dtype for md in tensors)))


def _packed(outputs: Sequence[Output], limit: int) -> list[tuple[Output, ...]]:
    """Objects in the first shard, tensors in order, each shard as full as it can be."""
    shards: list[list[Output]] = [[output for output in outputs if output.shape is None]]
    size = 0
    for output in outputs:
        if output.shape is None:
            continue
        if size and size + output.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return [tuple(shard) for shard in shards]


def portions(outputs: Sequence[Output]) -> Iterator[list[Output]]:
    """A shard in portions that are held in memory together; wide elements first, as safetensors files have them."""
    portion: list[Output] = []
    size = 0
    for output in sorted(outputs, key=lambda output: (output.dtype is not None, -output.dtype.itemsize if output.dtype else 0)):
        if size and size + output.nbytes > PORTION_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(output)
        size += output.nbytes
    if portion:
        yield portion


def stored_objects(plan: Plan, outputs: Sequence[Output]) -> list[str]:
    """The flat keys of a shard whose lists of parameters are read and renamed."""
    return [output.key for output in outputs if output.key in plan.renamed_lists]


def placeholder(output: Output) -> Any:
    """What a reader fills: an empty tensor, or None for an object."""
    return None if output.shape is None else torch.empty(output.shape, dtype=output.dtype)
