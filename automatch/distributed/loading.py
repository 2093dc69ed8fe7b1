"""`load`: propose once, agree, read each rank's slices into a stage, agree again, and only then change the model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from automatch.apply import check_side
from automatch.distributed.crew import Crew
from automatch.distributed.entries import Entries, find_entries, find_source_prefix
from automatch.distributed.planner import MappedLoadPlanner
from automatch.distributed.reads import WholeRead
from automatch.distributed.source import dcp_load, given_mapping, match_groups, spec_of_metadata
from automatch.distributed.storage import Reader, identity, open_reader
from automatch.distributed.target import Target
from automatch.errors import LoadError, MappingError
from automatch.mapping import CONFIDENT, KeyMapping, Match, Side
from automatch.matching import Pins, propose_mapping
from automatch.refusal import explain_refusal, needed_keys, shorten, without_open_questions
from automatch.specs import StateSpec
from automatch.transforms import Copy, to_dict

logger = logging.getLogger("automatch.distributed")


class DistributedReport(NamedTuple):
    """What `load` did on this rank.

    Args:
        missing_keys: flat keys of the target that nothing fed.
        unexpected_keys: keys of the checkpoint's model that were not used.
        loaded: flat keys of the target that were loaded.
        converted: model keys that are not a plain copy of one tensor.
        whole_reads: targets whose sources had to be read whole here, with the memory that took.
        bytes_read: bytes that this rank read of the checkpoint's tensors and objects.
        mapping: the mapping that was used; complete on rank 0, matches alone elsewhere.
    """

    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    loaded: tuple[str, ...]
    converted: tuple[str, ...]
    whole_reads: tuple[WholeRead, ...]
    bytes_read: int
    mapping: KeyMapping

    def __repr__(self) -> str:
        return (
            f"DistributedReport({len(self.loaded)} entries loaded, {len(self.converted)} converted, {len(self.missing_keys)} missing, "
            f"{len(self.unexpected_keys)} unexpected, {self.bytes_read} bytes read on this rank)"
        )


@dataclass(frozen=True)
class _Order:
    """What rank 0 tells the others."""

    matches: tuple[Match, ...]
    source: Side
    target_fingerprint: str
    digest: str
    identity: str
    metadata: Any
    source_prefix: str
    groups: dict[int, int] | None


def load(
    model: Any,
    checkpoint: str | os.PathLike[str],
    mapping: KeyMapping | str | os.PathLike[str] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    strict: bool = True,
    threshold: float = CONFIDENT,
    pins: Pins | None = None,
    in_place: bool = False,
    timeout: float = 60.0,
    trust: bool = False,
    group: dist.ProcessGroup | None = None,
) -> DistributedReport:
    """Load a checkpoint with other keys into a sharded model: every rank calls it, all of them load or none.

    What is on the meta device gets its memory here, and an optimizer without state is read into directly. Where there are
    values already, the new ones stand beside them until all ranks agree, which takes that memory twice, unless `in_place` is set.

    Args:
        model: a module (FSDP2, tensor parallel, plain; also on the meta device), or a state_dict of such, nested or flat.
        checkpoint: a torch.distributed.checkpoint directory or a folder of safetensors files that every rank sees.
        mapping: a reviewed mapping, or its file; None proposes one, on rank 0 alone.
        optimizer: the module's optimizer; its state follows its parameters.
        strict: refuse when a parameter, or an entry of the optimizer, would keep its initial value.
        threshold: matches are used from this confidence on, in [0, 1]; decided ones always.
        pins: pairs that a person has decided, as for `propose_mapping`; ``{target: None}`` also says that the
            initial value is meant to stay.
        in_place: the values that are there are not worth keeping (after ``to_empty``, in a scratch state_dict): read over them,
            without a second copy. If a rank then fails while reading, every rank raises and the values are undefined.
        timeout: seconds without a sign of life after which a rank counts as lost and all others stop, > 0.
        trust: allow pickled entries to execute code.
        group: the process group; None for the default one.

    Raises:
        LoadError: loading was refused, or a rank failed or was lost; without `in_place`, nothing was changed on any rank.
        MappingError: the mapping was made for another model or checkpoint.
        CheckpointError: the checkpoint cannot be read.
    """
    with Crew(group, timeout=timeout) as crew:
        target = Target(model, optimizer)
        try:
            crew.together("describing the model", target.describe)
            return _load(crew, target, Path(checkpoint), _Options(mapping, strict, threshold, pins or {}, in_place, trust))
        except BaseException:
            target.forget()
            raise


@dataclass(frozen=True)
class _Options:
    mapping: KeyMapping | str | os.PathLike[str] | None
    strict: bool
    threshold: float
    pins: Pins
    in_place: bool
    trust: bool


def _load(crew: Crew, target: Target, path: Path, options: _Options) -> DistributedReport:
    given = crew.together("reading the mapping", lambda: given_mapping(options.mapping))
    proposed = crew.together("proposing", lambda: _propose(crew, target, path, given, options) if crew.leads else None)
    order: _Order = crew.together("receiving the mapping", lambda: proposed[0] if proposed else crew.receive())
    mapping = crew.together("checking the fingerprints", lambda: _checked(order, target, path, given))
    reader = open_reader(path, order.metadata, trust=options.trust)
    entries = crew.together("planning", lambda: find_entries(mapping, target.flat, order.metadata, order.groups, order.source_prefix))
    planner = MappedLoadPlanner(
        mapping,
        entries=entries,
        allow_partial_load=True,
        trust=options.trust,
        on_read=lambda _: crew.advance(),
        on_plan=lambda reads: _say_whole(crew, reads),
    )
    if options.in_place:
        crew.outcome = "The values that were there may be overwritten on every rank"
    staged = crew.together("reading", lambda: _read(target, entries, planner, reader, options))
    if crew.leads:
        _say_others_whole(crew, planner.whole_reads)
    loaded = tuple(map(target.name, staged))
    crew.together("restoring the optimizer", lambda: target.commit_optimizer(staged))
    crew.together("handing values to the module", lambda: target.hand_over(staged))
    target.commit(staged)
    used = {key for match in mapping.matches for key in match.sources}
    return DistributedReport(
        tuple(map(target.name, entries.missing)),
        tuple(t.key for t in spec_of_metadata(order.metadata, str(path), order.source_prefix) if t.key not in used),
        loaded,
        tuple(match.target for match in mapping.matches if not isinstance(match.transform, Copy)),
        tuple(planner.whole_reads),
        reader.bytes_read,
        proposed[1] if proposed else mapping,
    )


def _propose(crew: Crew, target: Target, path: Path, given: KeyMapping | None, options: _Options) -> tuple[_Order, KeyMapping]:
    """On rank 0: the mapping, from metadata alone, and what the others need to follow it."""
    reader = open_reader(path, trust=options.trust)
    metadata = reader.read_metadata()
    if given is None:
        source = spec_of_metadata(metadata, str(path))
        whole = propose_mapping(target.spec, source, pins=options.pins)
        prefix = "".join(f"{part}." for part in source.wrapper)
    else:
        prefix = find_source_prefix(given, metadata)
        source = spec_of_metadata(metadata, str(path), prefix)
        check_side(given.source, source, "checkpoint")
        check_side(given.target, target.spec, "model")
        whole = given
        for key, sources in options.pins.items():
            whole = whole.decide(key, sources)
    plan = without_open_questions(whole.confident(options.threshold))
    fed = (*(match.target for match in plan.matches), *(key for key, sources in options.pins.items() if sources is None))
    needed = needed_keys(target.spec, fed)
    if options.strict and needed:
        raise LoadError(explain_refusal(whole, needed, options.threshold))
    lean = tuple(Match(match.target, match.sources, match.transform) for match in plan.matches)
    groups = match_groups(plan, target.flat, reader, trust=options.trust)
    side = Side(str(path), source.fingerprint, len(source), StateSpec((), str(path), source.wrapper))
    order = _Order(lean, side, target.spec.fingerprint, digest(given or plan), identity(path), metadata, prefix, groups)
    return crew.hand_out(order), whole


def _checked(order: _Order, target: Target, path: Path, given: KeyMapping | None) -> KeyMapping:
    """On every rank: the same model, the same checkpoint, the same mapping as on rank 0."""
    if target.spec.fingerprint != order.target_fingerprint:
        here, there = target.spec.fingerprint, order.target_fingerprint
        raise MappingError(f"this rank's model has fingerprint {here}, rank 0's {there}; build the same model on all ranks")
    if (found := identity(path)) != order.identity:
        raise MappingError(
            f"{str(path)!r} is another checkpoint here ({found}) than on rank 0 ({order.identity}); pass a path that all ranks share"
        )
    if given is not None and digest(given) != order.digest:
        raise MappingError("this rank was given another mapping than rank 0; pass the same one on all ranks, or None")
    mapping = KeyMapping(order.source, Side.of(target.spec), order.matches)
    return replace(mapping, missing_keys=tuple(key for key in target.spec.keys if key not in mapping))


def _read(target: Target, entries: Entries, planner: MappedLoadPlanner, reader: Reader, options: _Options) -> dict[str, Any]:
    model_keys = {entries.target_prefix + key for key in target.spec.keys}
    lost = [key for key in entries.missing if key not in model_keys]
    if options.strict and lost:
        raise LoadError(
            f"nothing in the checkpoint feeds {len(lost)} entries: {shorten(lost)}; "
            "load the model without its optimizer, or with strict=False"
        )
    staged = target.stage([entry.target for entry in entries.fed], in_place=options.in_place)
    dcp_load(staged, reader, planner)
    target.check(staged)
    return staged


def _say_whole(crew: Crew, reads: Sequence[WholeRead]) -> None:
    """Before reading: rank 0 says what its reads will cost, the others leave word of theirs."""
    if not crew.leads:
        if reads:
            crew.leave_word("whole", json.dumps([[read.key, read.nbytes, read.reason] for read in reads]))
        return
    for read in reads:
        size = f"{read.nbytes / 2**20:.1f} MiB"
        logger.warning(
            "%r cannot be read in slices (%s): its sources are read whole, %s of memory while that lasts", read.key, read.reason, size
        )


def _say_others_whole(crew: Crew, own: Sequence[WholeRead]) -> None:
    said = {read.key for read in own}
    others = [WholeRead(*read) for text in crew.words("whole") for read in json.loads(text)]
    _say_whole(crew, list({read.key: read for read in others if read.key not in said}.values()))


def digest(mapping: KeyMapping) -> str:
    """A digest of what a mapping does: its matches' targets, sources and transforms."""
    lines = (json.dumps([match.target, match.sources, to_dict(match.transform)]) for match in mapping.matches)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
