"""What feeds every entry of a flat target state_dict: the mapping's matches, and what follows them.

Keys here are those of torch.distributed.checkpoint: nested dicts flattened with dots. A model's entries may stand
under a prefix (``model.``) on either side; optimizer state (``optim.state.<key>.exp_avg``) follows its parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from automatch.collector import no_collection
from automatch.errors import LoadError, MappingError
from automatch.mapping import KeyMapping, Match
from automatch.transforms import Copy, Transform

_STATE, _GROUPS, EXTRA = "state", "param_groups", "_extra_state"
_PREFERRED = ("", "model.", "state_dict.", "module.", "app.model.")


@dataclass(frozen=True, slots=True)
class Entry:
    """What feeds one entry of the target.

    Args:
        target: its flat key.
        sources: the checkpoint's flat keys, in the order in which `transform` takes them.
        transform: how they become the target.
        agree: the sources must all hold the same value, which is taken (an optimizer's step count).
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform
    agree: bool = False


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries that are fed, and the keys that are not.

    Args:
        fed: in the order of the target.
        missing: flat keys of the target that nothing feeds.
        target_prefix: what stands before the model's keys in the target.
        source_prefix: what stands before the mapping's keys in the checkpoint.
    """

    fed: tuple[Entry, ...]
    missing: tuple[str, ...]
    target_prefix: str
    source_prefix: str


@no_collection()
def find_entries(
    mapping: KeyMapping,
    target: Mapping[str, Any],
    metadata: Metadata,
    groups: Mapping[int, int] | None = None,
    source_prefix: str | None = None,
) -> Entries:
    """Find what feeds each entry of a flat state_dict.

    Args:
        mapping: which keys of the checkpoint feed which keys of the model.
        target: the flat state_dict.
        metadata: what the checkpoint holds.
        groups: parameter group of the optimizer to the one of the checkpoint whose settings it takes.
        source_prefix: what stands before the mapping's keys in the checkpoint; None finds it.

    Raises:
        MappingError: the mapping's keys are not found in the target or the checkpoint.
        LoadError: a parameter group has no single group of the checkpoint to follow.
    """
    stored = metadata.state_dict_metadata
    if source_prefix is None:
        source_prefix = find_source_prefix(mapping, metadata)
    target_prefix = find_prefix([match.target for match in mapping.matches], target, "target")
    follower = _Follower(mapping, stored, source_prefix, groups)
    model_keys = _model_keys(mapping, target, target_prefix)
    fed: list[Entry] = []
    missing: list[str] = []
    for key in target:
        entry = follower.matched(key, key[len(target_prefix) :]) if key in model_keys else follower.followed(key, target_prefix)
        if entry is None:
            missing.append(key)
        elif entry.sources:
            fed.append(entry)
    return Entries(tuple(fed), tuple(missing), target_prefix, source_prefix)


def find_source_prefix(mapping: KeyMapping, metadata: Metadata) -> str:
    """What stands before the mapping's keys in the checkpoint, e.g. ``"model."``.

    Raises:
        MappingError: the keys are not there, or stand there several times.
    """
    wrapper = mapping.source.spec.wrapper if mapping.source.spec is not None else ()
    sources = list(dict.fromkeys(key for match in mapping.matches for key in match.sources))
    preferred = ("".join(f"{part}." for part in wrapper), *_PREFERRED)
    return find_prefix(sources, metadata.state_dict_metadata, "checkpoint", preferred=preferred)


def find_prefix(keys: Sequence[str], available: Mapping[str, Any], side: str, preferred: Sequence[str] = _PREFERRED) -> str:
    """What stands before ``keys`` in a flat state_dict.

    Args:
        keys: keys of a mapping.
        available: the flat state_dict.
        side: "checkpoint" or "target", for messages.
        preferred: prefixes to take first where several hold all keys.

    Raises:
        MappingError: there is no such prefix, or there are several.
    """
    if not keys:
        return ""
    ending = "." + keys[0]
    found = [name[: -len(keys[0])] for name in available if name.endswith(ending) or name == keys[0]]
    complete = [prefix for prefix in found if all(prefix + key in available for key in keys)]
    first = next((prefix for prefix in preferred if prefix in complete), None)
    if first is not None:
        return first
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise MappingError(
            f"the mapping's keys stand several times in the {side}, under {', '.join(map(repr, complete))}; pass only one of them"
        )
    best = max(found, key=lambda prefix: sum(prefix + key in available for key in keys), default="")
    absent = next(key for key in keys if best + key not in available)
    raise MappingError(f"{best + absent!r} is not a key of the {side}; the mapping was made for another one")


def _model_keys(mapping: KeyMapping, target: Mapping[str, Any], prefix: str) -> set[str]:
    spec = mapping.target.spec
    if spec is not None:
        return {prefix + key for key in spec.keys} & set(target)
    return {prefix + key for key in (*(m.target for m in mapping.matches), *mapping.missing_keys)} & set(target)


class _Follower:
    """Finds the sources of single entries."""

    def __init__(self, mapping: KeyMapping, stored: Mapping[str, Any], prefix: str, groups: Mapping[int, int] | None) -> None:
        self._matches = {match.target: match for match in mapping.matches}
        self._stored, self._prefix, self._groups = stored, prefix, groups
        self._sources = {key for match in mapping.matches for key in match.sources}
        self._prefixes: dict[str, list[str]] = {}
        self._modules: dict[str, set[str]] = {}
        for match in mapping.matches:
            if len(match.sources) == 1 and isinstance(match.transform, Copy):
                module, source = match.target.rpartition(".")[0], match.sources[0].rpartition(".")[0]
                self._modules.setdefault(module, set()).add(source)

    def matched(self, key: str, name: str) -> Entry | None:
        """The entry of a model key."""
        match = self._matches.get(name)
        if match is None:
            return None
        return Entry(key, tuple(self._prefix + source for source in match.sources), match.transform)

    def followed(self, key: str, target_prefix: str) -> Entry | None:
        """The entry of a key that no match names: optimizer state, a module's extra state, or its namesake."""
        for section, find in ((_STATE, self._state), (_GROUPS, self._group)):
            for prefix, rest in sections(key, section):
                entry = find(key, prefix, rest)
                if entry is not None:
                    return entry
                if self._owner(rest, self._matches) is not None:
                    return None
        module, dot, rest = key.removeprefix(target_prefix).partition(f".{EXTRA}")
        if dot and key.startswith(target_prefix):
            return self._extra(key, module, rest)
        return Entry(key, (key,), Copy()) if key in self._stored else None

    def _state(self, key: str, prefix: str, rest: str) -> Entry | None:
        owner = self._owner(rest, self._matches)
        if owner is None:
            return None
        match, field = self._matches[owner], rest[len(owner) :]
        for found in self._where(prefix, _STATE):
            sources = tuple(f"{found}{_STATE}.{source}{field}" for source in match.sources)
            if all(source in self._stored for source in sources):
                return self._state_entry(key, match, sources)
        return None

    def _state_entry(self, key: str, match: Match, sources: tuple[str, ...]) -> Entry | None:
        """State of the parameter's own shape takes the parameter's transform; single numbers must agree."""
        kinds = [self._stored[source] for source in sources]
        if any(isinstance(kind, BytesStorageMetadata) for kind in kinds) or all(kind.size.numel() == 1 for kind in kinds):
            return Entry(key, sources[:1], Copy()) if len(sources) == 1 else Entry(key, sources, Copy(), agree=True)
        parameters = [self._stored[self._prefix + source] for source in match.sources]
        if isinstance(match.transform, Copy) or all(k.size == p.size for k, p in zip(kinds, parameters, strict=True)):
            return Entry(key, sources, match.transform)
        return None

    def _group(self, key: str, prefix: str, rest: str) -> Entry | None:
        number, _, field = rest.partition(".")
        if number.isdigit():
            if field == "params":  # these are the model's own keys
                return Entry(key, (), Copy())
            return self._numbered_group(key, prefix, int(number), field)
        owner = self._owner(rest, self._matches)
        if owner is None:
            return None
        field = rest[len(owner) :]
        for found in self._where(prefix, _GROUPS):
            sources = tuple(f"{found}{_GROUPS}.{source}{field}" for source in self._matches[owner].sources)
            if all(source in self._stored for source in sources):
                return Entry(key, sources, Copy(), agree=len(sources) > 1)
        return None

    def _numbered_group(self, key: str, prefix: str, number: int, field: str) -> Entry | None:
        for found in self._where(prefix, _GROUPS):
            groups = self._groups
            if groups is None:
                if f"{found}{_GROUPS}.1.params" in self._stored or number:
                    raise LoadError(
                        f"{key!r}: which parameter group of the checkpoint is it? Use automatch.distributed.load, which reads them"
                    )
                groups = {0: 0}
            source = f"{found}{_GROUPS}.{groups.get(number)}.{field}"
            if source in self._stored:
                return Entry(key, (source,), Copy())
        return None

    def _extra(self, key: str, module: str, rest: str) -> Entry | None:
        """A module's extra state; where it is a dict, each of its entries has a flat key."""
        sources = self._modules.get(module, set())
        name = f"{self._prefix}{next(iter(sources))}.{EXTRA}{rest}" if len(sources) == 1 else ""
        return Entry(key, (name,), Copy()) if name in self._stored else None

    def _owner(self, rest: str, names: Iterable[str]) -> str | None:
        """The longest known key that a flat key starts with."""
        owner = rest
        while owner:
            owner = owner.rpartition(".")[0]
            if owner in names:
                return owner
        return None

    def _where(self, prefix: str, section: str) -> list[str]:
        """Where the checkpoint keeps such a section: under the same prefix, or wherever one of its sources stands."""
        if section not in self._prefixes:
            found = dict.fromkeys(
                head
                for key in self._stored
                for head, rest in sections(key, section)
                if rest[:1].isdigit() or self._owner(rest, self._sources)
            )
            self._prefixes[section] = list(found)
        known = self._prefixes[section]
        return [prefix] if prefix in known else known


def sections(key: str, section: str) -> Iterator[tuple[str, str]]:
    """Each way to read a flat key as ``<prefix><section>.<rest>``."""
    parts = key.split(".")
    for i, part in enumerate(parts[:-1]):
        if part == section:
            yield "".join(f"{p}." for p in parts[:i]), ".".join(parts[i + 1 :])
