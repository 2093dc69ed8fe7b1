"""`MappedLoadPlanner`: torch.distributed.checkpoint's own load planner, with mapped keys and transforms as slices."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from automatch.collector import no_collection
from automatch.distributed.boxes import Piece, cut, relative, sizes
from automatch.distributed.chunks import box_of, is_elsewhere, local_chunks, narrow, seen_as_source, seen_as_target
from automatch.distributed.entries import Entries, Entry, find_entries
from automatch.distributed.reads import Part, Whole, WholeRead
from automatch.distributed.reshapes import Box, NotSliceableError
from automatch.errors import LoadError, TransformError, UnsafeCheckpointError
from automatch.mapping import KeyMapping
from automatch.transforms import apply_transform, output_shape


class MappedLoadPlanner(DefaultLoadPlanner):
    """Loads a checkpoint with other keys: pass it to ``torch.distributed.checkpoint.load`` as ``planner=``.

    Each rank reads only the slices that its shards need. Targets that need whole sources are listed in `whole_reads`.

    Args:
        mapping: which keys of the checkpoint feed which keys of the state_dict; every match of it is used, whatever its
            confidence.
        groups: parameter group of the optimizer to the one of the checkpoint whose settings it takes.
        entries: what feeds each entry, where it has been found already.
        allow_partial_load: leave entries that nothing feeds as they are; otherwise they are an error.
        trust: allow non-tensor entries to execute code while they are unpickled.
        on_read: called with the bytes of each tensor slice that has been read; may raise to stop the load.
        on_plan: called before anything is read, with what has to be read whole.

    Raises:
        LoadError: an entry is not fed, or its sources do not fit it; the message names it.
    """

    def __init__(
        self,
        mapping: KeyMapping,
        *,
        groups: Mapping[int, int] | None = None,
        entries: Entries | None = None,
        allow_partial_load: bool = False,
        trust: bool = False,
        on_read: Callable[[int], None] | None = None,
        on_plan: Callable[[Sequence[WholeRead]], None] | None = None,
    ) -> None:
        super().__init__(allow_partial_load=allow_partial_load)
        self._mapping, self._groups, self._trust = mapping, groups, trust
        self._on_read, self._on_plan = on_read, on_plan
        self._entries = entries
        self._reads: list[tuple[Part | Whole | str, int]] = []
        self.whole_reads: list[WholeRead] = []
        self.bytes_planned = 0

    @property
    def entries(self) -> Entries:
        """What feeds each entry; known once the planner is set up."""
        if self._entries is None:
            raise LoadError("the planner has not been set up yet; torch.distributed.checkpoint.load does that")
        return self._entries

    @no_collection()
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Find out what feeds each entry of the state_dict."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        if metadata is None:
            raise LoadError("a checkpoint without metadata cannot be loaded with other keys")
        if self._entries is None:
            self._entries = find_entries(self._mapping, self.state_dict, metadata, self._groups)
        if self._entries.missing and not self.allow_partial_load:
            shown = ", ".join(map(repr, self._entries.missing[:5]))
            raise LoadError(
                f"nothing in the checkpoint feeds {len(self._entries.missing)} entries: {shown}; complete the mapping, or load partially"
            )

    @no_collection()
    def create_local_plan(self) -> LoadPlan:
        """One read per slice of a stored chunk that this rank's shards need; those that need whole sources come last."""
        self._reads, self.whole_reads, self.bytes_planned = [], [], 0
        items: list[ReadItem] = []
        late: list[ReadItem] = []
        for entry in self.entries.fed:
            if not is_elsewhere(self.state_dict[entry.target]):
                (late if entry.agree else items).extend(self._plan_entry(entry, late))
        if self._on_plan is not None:
            self._on_plan(self.whole_reads)
        return LoadPlan([*items, *late])

    def batches(self, items: Sequence[ReadItem]) -> Iterator[list[ReadItem]]:
        """The sliced reads together, then each target that needs whole sources by itself, to bound the memory."""
        sliced = [item for item in items if not isinstance(self._read(item)[0], Whole)]
        if sliced:
            yield sliced
        alone: dict[int, list[ReadItem]] = {}
        for item in items:
            read = self._read(item)[0]
            if isinstance(read, Whole):
                alone.setdefault(id(read), []).append(item)
        yield from alone.values()

    # ---- reading ------------------------------------------------------------------------------------------

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickle a non-tensor entry, without executing anything."""
        read, position = self._read(read_item)
        try:
            loaded = torch.load(value, weights_only=not self._trust)
        except pickle.UnpicklingError as error:
            key = read_item.storage_index.fqn
            raise UnsafeCheckpointError(f"entry {key!r} was not read: {error}; pass trust=True if you know who wrote it") from error
        if isinstance(read, Whole):
            read.objects[position] = loaded
            self._arrived(read)
        else:
            self._put(read_item.dest_index.fqn, loaded)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where the reader writes a slice: into the target itself where its memory allows that."""
        read, position = self._read(read_item)
        if isinstance(read, Whole):
            if not read.buffers:
                read.buffers = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(read.shapes, read.dtypes, strict=True)]
            return narrow(read.buffers[position], read_item.dest_offsets, read_item.lengths)
        assert isinstance(read, Part)
        view = seen_as_source(read.target, read.piece)
        if view is None:
            read.buffer = view = torch.empty(sizes(read.piece.box), dtype=read.local.dtype, device=read.local.device)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Bring a slice that was read into a buffer to its place."""
        read, _ = self._read(read_item)
        if isinstance(read, Whole):
            self._arrived(read)
        elif isinstance(read, Part) and read.buffer is not None:
            read.target.copy_(seen_as_target(read.buffer, read.piece))
            read.buffer = None
        if self._on_read is not None:
            self._on_read(tensor.nbytes)

    def _arrived(self, read: Whole) -> None:
        read.waiting -= 1
        if read.waiting:
            return
        if read.entry.agree:
            self._put_agreed(read)
        elif read.local is not None and read.box is not None:
            joined = apply_transform(read.entry.transform, read.buffers)
            read.local.copy_(narrow(joined, [start for start, _ in read.box], sizes(read.box)))
        read.buffers, read.objects = [], []

    def _put_agreed(self, read: Whole) -> None:
        values: list[Any] = read.buffers or read.objects
        first = values[0]
        if any(not torch.equal(first, v) if isinstance(first, torch.Tensor) else first != v for v in values[1:]):
            listed = ", ".join(
                f"{key} = {v.item() if isinstance(v, torch.Tensor) else v!r}" for key, v in zip(read.entry.sources, values, strict=True)
            )
            raise LoadError(f"the sources of {read.entry.target!r} differ, and one value must stand for all: {listed}")
        if read.local is not None:
            read.local.copy_(first.reshape(read.local.shape) if isinstance(first, torch.Tensor) else torch.as_tensor(first))
        else:
            self._put(read.entry.target, first)

    def _put(self, key: str, value: Any) -> None:
        set_element(self.original_state_dict, self.mappings[key], value)

    def _read(self, item: ReadItem) -> tuple[Part | Whole | str, int]:
        return self._reads[item.dest_index.index or 0]

    # ---- planning -----------------------------------------------------------------------------------------

    def _plan_entry(self, entry: Entry, late: list[ReadItem]) -> list[ReadItem]:
        assert self.metadata is not None
        stored = [self.metadata.state_dict_metadata[key] for key in entry.sources]
        value = self.state_dict[entry.target]
        tensors = [md for md in stored if isinstance(md, TensorStorageMetadata)]
        if len(tensors) < len(stored):
            return self._plan_objects(entry, stored)
        if not isinstance(value, torch.Tensor):
            raise LoadError(
                f"{entry.target!r} is {type(value).__name__}, the checkpoint's {entry.sources[0]!r} a tensor; make the target one as well"
            )
        shapes = [tuple(md.size) for md in tensors]
        items: list[ReadItem] = []
        for local, box in local_chunks(value):
            if entry.agree:
                items.extend(self._plan_whole(entry, tensors, local, box))
                continue
            self._check_shape(entry, shapes, tuple(value.shape))
            chunks = [[box_of(chunk) for chunk in md.chunks] for md in tensors]
            try:
                pieces = cut(entry.transform, chunks, shapes, box)
            except TransformError as error:
                raise LoadError(f"{entry.target!r} cannot be made of {', '.join(map(repr, entry.sources))}: {error}") from error
            except NotSliceableError as reason:
                nbytes = sum(md.size.numel() * md.properties.dtype.itemsize for md in tensors)
                self.whole_reads.append(WholeRead(entry.target, nbytes, str(reason)))
                late.extend(self._plan_whole(entry, tensors, local, box))
                continue
            items.extend(self._plan_piece(entry, tensors, piece, Part(piece, local, box)) for piece in pieces)
        return items

    def _plan_piece(self, entry: Entry, tensors: Sequence[TensorStorageMetadata], piece: Piece, part: Part) -> ReadItem:
        md, key = tensors[piece.source], entry.sources[piece.source]
        chunk = md.chunks[piece.chunk]
        inside = relative(piece.box, box_of(chunk))
        lengths = torch.Size(sizes(piece.box))
        self.bytes_planned += lengths.numel() * md.properties.dtype.itemsize
        return ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=self._index(entry.target, part, 0),
            dest_offsets=torch.Size([0] * len(lengths)),
            storage_index=MetadataIndex(key, chunk.offsets, piece.chunk),
            storage_offsets=torch.Size([start for start, _ in inside]),
            lengths=lengths,
        )

    def _plan_whole(self, entry: Entry, tensors: Sequence[TensorStorageMetadata], local: torch.Tensor, box: Box) -> list[ReadItem]:
        read = Whole(entry, [tuple(md.size) for md in tensors], [md.properties.dtype for md in tensors], local, box)
        items: list[ReadItem] = []
        for position, (key, md) in enumerate(zip(entry.sources, tensors, strict=True)):
            whole_chunk = ChunkStorageMetadata(torch.Size([0] * len(md.size)), md.size)
            for item in create_read_items_for_chunk_list(key, md, [whole_chunk]):
                items.append(replace(item, dest_index=self._index(entry.target, read, position)))
                self.bytes_planned += item.lengths.numel() * md.properties.dtype.itemsize
        read.waiting = len(items)
        return items

    def _plan_objects(self, entry: Entry, stored: Sequence[Any]) -> list[ReadItem]:
        if len(stored) > 1 and (not entry.agree or not all(isinstance(md, BytesStorageMetadata) for md in stored)):
            raise LoadError(f"{entry.target!r} cannot be made of {', '.join(map(repr, entry.sources))}: not all of them are tensors")
        read: Whole | str = entry.target
        if entry.agree:
            read = Whole(entry, [], [], None, None, len(stored), objects=[None] * len(stored))
        zero = torch.Size([0])
        return [
            ReadItem(LoadItemType.BYTE_IO, self._index(entry.target, read, i), zero, MetadataIndex(key), zero, zero)
            for i, key in enumerate(entry.sources)
        ]

    def _index(self, key: str, read: Part | Whole | str, position: int) -> MetadataIndex:
        self._reads.append((read, position))
        return MetadataIndex(key, index=len(self._reads) - 1)

    def _check_shape(self, entry: Entry, shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> None:
        try:
            given = output_shape(entry.transform, shapes)
        except TransformError as error:
            raise LoadError(f"what feeds {entry.target!r} does not fit: {error}") from error
        if given != wanted:
            sources = ", ".join(map(repr, entry.sources))
            raise LoadError(f"size mismatch for {entry.target!r}: checkpoint {given} (from {sources}), model {wanted}")
