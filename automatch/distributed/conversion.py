"""`convert`: a checkpoint larger than any machine under new keys, by many ranks, in shards that survive a crash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from automatch.apply import check_side
from automatch.distributed.crew import Crew
from automatch.distributed.entries import Entries, find_source_prefix
from automatch.distributed.planner import MappedLoadPlanner
from automatch.distributed.reads import WholeRead
from automatch.distributed.shard_files import ShardFiles
from automatch.distributed.shards import Format, Output, Plan, assign, placeholder, plan_conversion, portions, renamed, stored_objects
from automatch.distributed.source import dcp_load, given_mapping, read_objects, spec_of_metadata
from automatch.distributed.storage import Reader, identity, open_reader
from automatch.errors import CheckpointError, MappingError
from automatch.mapping import KeyMapping, Match, Side

SHARD_BYTES = 2 * 10**9
Progress = Callable[[int, int], None]


class ConversionReport(NamedTuple):
    """What `convert` wrote.

    Args:
        path: the new checkpoint.
        n_tensors: number of tensors.
        n_bytes: bytes of all tensors.
        n_shards: number of files with tensors.
        n_reused: how many of them an earlier, interrupted run had completed.
        left_out: the checkpoint's flat keys that are not in the output.
        whole_reads: targets whose sources were read whole on this rank although a slice was wanted.
    """

    path: Path
    n_tensors: int
    n_bytes: int
    n_shards: int
    n_reused: int
    left_out: tuple[str, ...]
    whole_reads: tuple[WholeRead, ...] = ()


@dataclass(frozen=True)
class _Order:
    """What rank 0 tells the others."""

    mapping: KeyMapping
    plan: Plan
    metadata: Any
    identity: str
    done: frozenset[int]


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    mapping: KeyMapping | str | os.PathLike[str] | None = None,
    *,
    to: Format = "safetensors",
    max_shard_bytes: int = SHARD_BYTES,
    timeout: float = 60.0,
    trust: bool = False,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write a checkpoint under a mapping's keys; every rank calls it and writes its share of the bytes.

    The output is written beside ``out`` (``<out>.incomplete``) and gets its name when it is complete. Called again after
    a crash, with any number of ranks, it goes on with the shards that are not complete. A rank holds 16 MB in memory, or one
    tensor that is larger.

    Args:
        checkpoint: a torch.distributed.checkpoint directory or a folder of safetensors files that every rank sees.
        out: the new directory; it must not exist.
        mapping: a reviewed mapping, or its file; every match of it is used, whatever its confidence. None keeps all keys.
        to: "safetensors" for a folder with an index (tensors of the model alone), "dcp" for a
            torch.distributed.checkpoint directory (optimizer state and objects follow).
        max_shard_bytes: the largest file, in bytes, > 0; a larger tensor has a file to itself.
        timeout: seconds without a sign of life after which a rank counts as lost and all others stop, > 0.
        trust: allow pickled entries to execute code.
        group: the process group; None for the default one.
        progress: called on rank 0 with (bytes done on all ranks, bytes in all).

    Raises:
        CheckpointError: the checkpoint cannot be read or has changed meanwhile, or the output cannot be written.
        MappingError: the mapping was made for another checkpoint.
        LoadError: a rank failed or was lost; complete shards are kept for the next call.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    source = Path(checkpoint)
    files = ShardFiles(Path(out), to)
    with Crew(group, timeout=timeout, outcome="Complete shards are kept for the next call") as crew:
        given = crew.together("reading the mapping", lambda: given_mapping(mapping))
        made = crew.together("planning", lambda: _plan(crew, source, files, given, max_shard_bytes, trust) if crew.leads else None)
        order: _Order = crew.together("receiving the plan", lambda: made or crew.receive())
        reader = crew.together("opening the checkpoint", lambda: _opened(order, source, trust))
        whole = crew.together("converting", lambda: _write_share(crew, order, reader, files, progress, trust))
        crew.together("finishing", lambda: _finish(source, order.plan, files) if crew.leads else None)
    outputs = [output for shard in order.plan.shards for output in shard if output.shape is not None]
    total = sum(output.nbytes for output in outputs)
    return ConversionReport(files.out, len(outputs), total, len(order.plan.shards), len(order.done), order.plan.left_out, tuple(whole))


def _plan(crew: Crew, source: Path, files: ShardFiles, given: KeyMapping | None, limit: int, trust: bool) -> _Order:
    """On rank 0: what goes where, and what an earlier run has left."""
    files.refuse_existing()
    metadata = open_reader(source, trust=trust).read_metadata()
    if given is None:
        side = Side.of(spec_of_metadata(metadata, str(source)))
        assert side.spec is not None
        mapping = KeyMapping(side, side, tuple(Match(key, (key,)) for key in side.spec.keys))
    else:
        check_side(given.source, spec_of_metadata(metadata, str(source), find_source_prefix(given, metadata)), "checkpoint")
        mapping = given
    lean = tuple(Match(match.target, match.sources, match.transform) for match in mapping.matches)
    mapping = KeyMapping(replace(mapping.source, spec=None), replace(mapping.target, spec=None), lean)
    found = identity(source)
    plan = plan_conversion(mapping, metadata, files.format, limit, identity(source, times=True))
    return crew.hand_out(_Order(mapping, plan, metadata, found, files.begin(plan)))


def _opened(order: _Order, source: Path, trust: bool) -> Reader:
    if (found := identity(source)) != order.identity:
        raise MappingError(
            f"{str(source)!r} is another checkpoint here ({found}) than on rank 0 ({order.identity}); use a path that all ranks share"
        )
    return open_reader(source, order.metadata, trust=trust)


def _write_share(crew: Crew, order: _Order, reader: Reader, files: ShardFiles, progress: Progress | None, trust: bool) -> list[WholeRead]:
    plan = order.plan
    sizes = {shard: plan.nbytes(shard) for shard in range(len(plan.shards))}
    total, kept = sum(sizes.values()), sum(sizes[shard] for shard in order.done)

    def count(nbytes: int) -> None:
        done = crew.count("bytes", nbytes)
        if progress is not None and crew.leads:
            progress(kept + done, total)

    values = _Values(order, reader, trust, crew.advance)
    share = assign({shard: size for shard, size in sizes.items() if shard not in order.done}, crew.size)[crew.rank]
    for shard in share:
        files.write(plan, shard, values.of(plan.shards[shard], count))
        crew.advance()
    return values.whole_reads


class _Values:
    """Reads what a shard holds, portion by portion, so that a rank holds a few tensors and no shard."""

    def __init__(self, order: _Order, reader: Reader, trust: bool, on_read: Callable[[], None]) -> None:
        self._order, self._reader, self._trust, self._on_read = order, reader, trust, on_read
        self._fed = {entry.target: entry for entry in order.plan.entries.fed}
        self.whole_reads: list[WholeRead] = []

    def of(self, outputs: tuple[Output, ...], count: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
        """Keys and values of a shard, in the order of `portions`; ``count`` is told the bytes that were read."""
        for portion in portions(outputs):
            state = self._read(portion)
            count(sum(output.nbytes for output in portion))
            for output in portion:
                yield output.key, state.pop(output.key)

    def _read(self, portion: list[Output]) -> dict[str, Any]:
        plan, mapping = self._order.plan, self._order.mapping
        state = {output.key: placeholder(output) for output in portion if output.key in self._fed}
        entries = Entries(tuple(self._fed[key] for key in state), (), plan.entries.target_prefix, plan.entries.source_prefix)
        planner = MappedLoadPlanner(mapping, entries=entries, trust=self._trust, on_read=lambda _: self._on_read())
        if state:
            dcp_load(state, self._reader, planner)
        self.whole_reads.extend(planner.whole_reads)
        lists = read_objects(self._reader, stored_objects(plan, portion), trust=self._trust)
        return state | {key: renamed(value, mapping) for key, value in lists.items()}


def _finish(source: Path, plan: Plan, files: ShardFiles) -> None:
    if identity(source, times=True) != plan.checkpoint:
        raise CheckpointError(f"{str(source)!r} was written to while it was converted; remove {str(files.work)!r} and convert it again")
    files.finish(plan)
