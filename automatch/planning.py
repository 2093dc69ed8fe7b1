"""What a load will do, decided before any value is read: which matches are applied, which keys stay as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automatch.adapt import pins_to_adapt, plan_adaptations
from automatch.apply import check_side
from automatch.errors import LoadError, TransformError
from automatch.mapping import CONFIDENT, KeyMapping, Side
from automatch.migrations import find_migration, migrations_folders
from automatch.readers import open_checkpoint
from automatch.refusal import explain_refusal, fed_keys, needed_keys, without_open_questions
from automatch.specs import StateSpec, spec_of_model
from automatch.transforms import Concat, Stack, Transform, output_shape

if TYPE_CHECKING:
    from torch import nn

    from automatch.matching import Pins

MappingLike = KeyMapping | str | os.PathLike[str]


@dataclass(frozen=True)
class LoadPlan:
    """What a load will do.

    Args:
        whole: the mapping as proposed or given.
        chosen: the part of it that is applied, with the adaptations that were asked for.
        adapted: how the shape of a model key is adapted, by key.
        notes: what a person should know, e.g. where the mapping came from.
    """

    whole: KeyMapping
    chosen: KeyMapping
    adapted: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def target(self) -> StateSpec:
        """The model."""
        assert self.whole.target.spec is not None
        return self.whole.target.spec

    @property
    def fed(self) -> frozenset[str]:
        """The model keys that get a value, tied ones included."""
        return fed_keys(self.target, (match.target for match in self.chosen.matches))


def plan_load(
    model: nn.Module,
    ckpt: Any,
    *,
    mapping: MappingLike | None = None,
    threshold: float = CONFIDENT,
    strict: bool = True,
    pins: Pins | None = None,
    trust: bool = False,
    adapt: Mapping[str, str] | None = None,
) -> LoadPlan:
    """Decide what `load` will do; the arguments are those of `load`.

    Raises:
        LoadError: under ``strict``, a parameter of the model would keep its initial value.
        MappingError: the mapping was made for another model or checkpoint.
    """
    target = spec_of_model(model)
    pins, adapt = dict(pins or {}), dict(adapt or {})
    adapted = pins_to_adapt(pins, adapt)
    notes: tuple[str, ...] = ()
    if mapping is None:
        mapping, notes = _reviewed(model, target, ckpt, trust)
    whole = _mapping_for(target, ckpt, mapping, {key: source for key, source in pins.items() if key not in adapted}, trust)
    sure = without_open_questions(whole.confident(threshold))
    adaptations = plan_adaptations(whole, sure, adapt, pins)
    chosen = sure.with_matches([*sure.matches, *adaptations.matches])  # of two for one key the latter counts
    accepted = {key for key, source in pins.items() if source is None} | adaptations.kept
    needed = [key for key in needed_keys(target, (m.target for m in chosen.matches)) if key not in accepted]
    if strict and needed:
        raise LoadError(explain_refusal(whole, needed, threshold))
    return LoadPlan(whole, chosen, adaptations.methods, notes)


def _reviewed(model: nn.Module, target: StateSpec, ckpt: Any, trust: bool) -> tuple[KeyMapping | None, tuple[str, ...]]:
    """A migration beside the model's code that leads from this checkpoint to it, and a note that says so."""
    folders = migrations_folders(model)
    if not folders:
        return None, ()
    with open_checkpoint(ckpt, like=target, trust=trust) as checkpoint:
        migration = find_migration(folders, checkpoint.spec, target)
    if migration is None:
        return None, ()
    return migration.mapping, (f"loaded through the reviewed migration {migration.names}",)


def _mapping_for(target: StateSpec, ckpt: Any, mapping: MappingLike | None, pins: Mapping[str, Any], trust: bool) -> KeyMapping:
    if mapping is None:
        from automatch.matching import propose_mapping  # scipy and rapidfuzz come with it

        return propose_mapping(target, ckpt, pins=pins, trust=trust)
    if not isinstance(mapping, KeyMapping):
        mapping = KeyMapping.load(Path(mapping))
    check_side(mapping.target, target, "model")
    for key, sources in pins.items():
        mapping = mapping.decide(key, sources, _transform_of(mapping, key, sources))
    return replace(mapping, target=Side.of(target))


def _transform_of(mapping: KeyMapping, key: str, sources: str | Sequence[str] | None) -> Transform | None:
    """The transform that a pin means: the one that the mapping has for the same sources, or the join that fits."""
    names = (sources,) if isinstance(sources, str) else tuple(sources or ())
    known = mapping.get(key)
    if known is not None and known.sources == names:
        return known.transform
    source, target = mapping.source.spec, mapping.target.spec
    if len(names) < 2 or source is None or target is None or key not in target or any(name not in source for name in names):
        return None
    shapes = [source[name].shape for name in names]
    for join in (Concat, Stack):
        for dim in range(len(target[key].shape)):
            with suppress(TransformError):
                if output_shape(join(dim), shapes) == target[key].shape:
                    return join(dim)
    return Concat(0)  # which fails with both shapes in its message
