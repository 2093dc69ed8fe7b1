"""Reviewed mappings beside the model's code: found by themselves, composed along chains, and checked for being stale.

A migration is a mapping that a person has accepted. It lies in the folder ``automatch_migrations`` next to the file
that defines the model, is committed with it, and is used by `automatch.load` before anything is guessed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automatch.apply import first_difference
from automatch.composing import compose
from automatch.errors import MappingError
from automatch.mapping import KeyMapping, Side
from automatch.specs import StateSpec
from automatch.transforms import Transform
from automatch.wrappers import plain_keys, plain_mapping, renamed_mapping, renamed_spec

if TYPE_CHECKING:
    from torch import nn

FOLDER = "automatch_migrations"
_MOST_CHAINS = 64

Step = tuple[Path, KeyMapping]


@dataclass(frozen=True)
class Migration:
    """A reviewed way from one layout to another.

    Args:
        mapping: what feeds each model key.
        files: the accepted files it is composed of, oldest first.
    """

    mapping: KeyMapping
    files: tuple[Path, ...]

    @property
    def names(self) -> str:
        """The file names, as a chain."""
        return " → ".join(path.name for path in self.files)


def migrations_folder(model: nn.Module) -> Path | None:
    """Where the migrations of a model belong: beside the file of the first of its classes that is not installed."""
    return next(_own_folders(type(module) for module in model.modules()), None)


def migrations_folders(model: nn.Module) -> tuple[Path, ...]:
    """Where migrations of a model may lie: where they belong, and beside the classes that its own class is derived from."""
    own = getattr(model, "_orig_mod", model)
    places = dict.fromkeys([migrations_folder(own), *_own_folders(type(own).__mro__)])
    return tuple(place for place in places if place is not None and place.is_dir())


def _own_folders(kinds: Iterable[type]) -> Iterator[Path]:
    from automatch.provenance import source_file

    for kind in dict.fromkeys(kinds):
        path = source_file(kind)
        if path is not None:
            yield path.parent / FOLDER


def accept(mapping: KeyMapping, place: nn.Module | str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a reviewed mapping as a migration; from now on `load` uses it by itself.

    Args:
        mapping: the mapping, without open questions; all its matches count as decided from now on.
        place: the model, beside whose code it is saved, or a folder.
        overwrite: replace a migration between the same two layouts that says something else.

    Returns:
        The file, named by the fingerprints of both sides.

    Raises:
        MappingError: questions are open, the mapping does not hold both specs, the model has no source file, or
            another migration is in its place.
    """
    if mapping.questions:
        listed = ", ".join(question.id for question in mapping.questions)
        raise MappingError(
            f"questions are open ({listed}); answer them with mapping.answer(question, option), or on the page of `automatch review`, "
            "before accepting the mapping"
        )
    if mapping.source.spec is None or mapping.target.spec is None:
        raise MappingError("a mapping without the keys of both sides cannot be accepted; propose it again")
    folder = _folder_of(place)
    reviewed = replace(mapping, matches=tuple(replace(match, decided=True, alternatives=()) for match in mapping.matches))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_short(mapping.source)}-{_short(mapping.target)}.json"
    if path.exists() and not overwrite:
        before = KeyMapping.load(path)
        if _decisions(before) != _decisions(reviewed):
            raise MappingError(
                f"{path} holds another mapping between the same two layouts; accept it with overwrite=True (--overwrite) to replace it"
            )
        return path
    return reviewed.save(path)


def _folder_of(place: Any) -> Path:
    if isinstance(place, str | os.PathLike):
        return Path(place)
    folder = migrations_folder(place)
    if folder is None:
        raise MappingError(f"{type(place).__name__} has no source file of its own to put a migration beside; name a folder")
    return folder


def _short(side: Side) -> str:
    return side.fingerprint.removeprefix("sha256:")[:12]


def _decisions(mapping: KeyMapping) -> dict[str, tuple[tuple[str, ...], Transform]]:
    return {match.target: (match.sources, match.transform) for match in mapping.matches}


def find_migration(folders: Iterable[Path], source: StateSpec, target: StateSpec) -> Migration | None:
    """The reviewed way from a checkpoint to a model, over one or several migrations; wrapped and plain keys are one layout.

    Returns:
        The shortest chain, or None if no migration begins at this checkpoint.

    Raises:
        MappingError: migrations begin at this checkpoint but none leads to this model (stale), two ways disagree
            (conflicting), or a file in the folders is damaged.
    """
    steps = [(path, _read(path)) for folder in folders for path in sorted(folder.glob("*.json"))]
    if not steps:
        return None
    sources, targets = plain_keys(source), plain_keys(target)
    found = _find(steps, renamed_spec(source, sources), renamed_spec(target, targets))
    if found is None or all(key == name for names in (sources, targets) for key, name in names.items()):
        return found
    wrapped = [{name: key for key, name in names.items()} for names in (sources, targets)]
    return replace(found, mapping=renamed_mapping(found.mapping, source, wrapped[0], target, wrapped[1]))


def _read(path: Path) -> KeyMapping:
    mapping = KeyMapping.load(path)
    if mapping.source.spec is None or mapping.target.spec is None:
        raise MappingError(f"migration {path} does not hold the keys of both sides; accept it again")
    return plain_mapping(mapping)


def _find(steps: Sequence[Step], source: StateSpec, target: StateSpec) -> Migration | None:
    begin = [step for step in steps if _same(step[1].source, source)]
    if first_difference(source, target) is None:  # it fits as it is; only a migration of its own may say otherwise
        chains = [(step,) for step in begin if _same(step[1].target, target)]
    else:
        chains = _chains(steps, begin, target)
        if begin and not chains:
            raise MappingError(_stale(begin, target))
    found = [_composed(chain) for chain in chains]
    if not found:
        return None
    best = found[0]
    for other in found[1:]:
        differing = _decisions(best.mapping).items() ^ _decisions(other.mapping).items()
        if differing:
            raise MappingError(
                f"conflicting migrations in {best.files[0].parent}: {best.names} and {other.names} lead to the same model, "
                f"but differ for {min(key for key, _ in differing)!r}; delete the wrong one"
            )
    return best


def _chains(steps: Sequence[Step], begin: Sequence[Step], target: StateSpec) -> list[tuple[Step, ...]]:
    """Every chain without detours that ends at ``target``, the shortest first."""
    found: list[tuple[Step, ...]] = []
    ends: list[tuple[Step, ...]] = [(step,) for step in begin]
    while ends and len(found) < _MOST_CHAINS:
        chain = ends.pop(0)
        reached = chain[-1][1].target
        if _same(reached, target):
            found.append(chain)
        elif reached.spec is not None:
            spec = reached.spec
            ends.extend((*chain, step) for step in steps if step not in chain and _same(step[1].source, spec))
    return found


def _composed(chain: Sequence[Step]) -> Migration:
    mapping = chain[0][1]
    for _, following in chain[1:]:
        mapping = compose(mapping, following)
    return Migration(mapping, tuple(path for path, _ in chain))


def _same(side: Side, spec: StateSpec) -> bool:
    return side.fingerprint == spec.fingerprint or (side.spec is not None and first_difference(side.spec, spec) is None)


def _stale(begin: Sequence[Step], target: StateSpec) -> str:
    path, mapping = begin[-1]
    reached = mapping.target.spec
    difference = first_difference(reached, target) if reached is not None else None
    return (
        f"stale migration: {path} begins at this checkpoint, but leads to another version of the model than today's "
        f"{target.origin} ({difference}); accept a new one (automatch propose, then automatch accept), or pass mapping= to load without it"
    )


def reviewed_mapping(model: nn.Module, source: StateSpec, target: StateSpec) -> Migration | None:
    """The migration from ``source`` to today's ``model``, from the folder beside its code; None if there is none."""
    return find_migration(migrations_folders(model), source, target)
