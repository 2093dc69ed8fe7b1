"""Which unused checkpoint tensor a model key would take if its shape had not changed: by its name, or as its neighbours were renamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from automatch.mapping import KeyMapping
from automatch.specs import TensorSpec


class Counterparts:
    """The checkpoint tensors of a mapping that feed nothing, and what its matches say of their new keys.

    Args:
        mapping: what feeds each model key; without the specs of both sides there are no counterparts.
    """

    def __init__(self, mapping: KeyMapping) -> None:
        self.mapping = mapping
        source = mapping.source.spec
        self.free = {} if source is None else {key: source[key] for key in mapping.unexpected_keys}

    def groups(self, key: str) -> Iterator[list[TensorSpec]]:
        """Candidates for a model key, the likeliest group first: the renamed key, one that ends like it, one with its last word."""
        yield [self.free[name] for name in (self.renamed(key),) if name is not None]
        yield self._longer.get(key, []) + [self.free[end] for end in _ends(key) if end in self.free]
        yield self._by_leaf.get(key.rpartition(".")[2], [])

    def renamed(self, key: str) -> str | None:
        """The unused checkpoint key that becomes ``key`` when it is renamed as matched keys around it are."""
        if key in self.free:
            return key
        words = key.split(".")
        for length in range(len(words) - 1, -1, -1):
            for prefix in self._prefixes.get(tuple(words[:length]), ()):
                name = ".".join((*prefix, *words[length:]))
                if name in self.free:
                    return name
        return None

    @cached_property
    def _prefixes(self) -> dict[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """For what matched model keys begin with what their sources begin with, up to where both go on alike; the commonest first."""
        counts: dict[tuple[str, ...], Counter[tuple[str, ...]]] = {}
        for match in self.mapping.matches:
            if len(match.sources) == 1:
                new, old = match.target.split("."), match.sources[0].split(".")
                while new and old and new[-1] == old[-1]:
                    new.pop()
                    old.pop()
                counts.setdefault(tuple(new), Counter())[tuple(old)] += 1
        return {new: tuple(old for old, _ in counter.most_common()) for new, counter in counts.items()}

    @cached_property
    def _longer(self) -> dict[str, list[TensorSpec]]:
        """By what they end with: the unused tensors whose keys have a prefix more."""
        longer: dict[str, list[TensorSpec]] = {}
        for key, tensor in self.free.items():
            for end in _ends(key):
                longer.setdefault(end, []).append(tensor)
        return longer

    @cached_property
    def _by_leaf(self) -> dict[str, list[TensorSpec]]:
        """By the last word of their keys: the unused tensors that are not the renamed ones of any model key."""
        claimed = {name for name in map(self.renamed, self.mapping.missing_keys) if name is not None}
        by_leaf: dict[str, list[TensorSpec]] = {}
        for key, tensor in self.free.items():
            if key not in claimed:
                by_leaf.setdefault(key.rpartition(".")[2], []).append(tensor)
        return by_leaf


def _ends(key: str) -> list[str]:
    """What is left of a key without its first words."""
    words = key.split(".")
    return [".".join(words[start:]) for start in range(1, len(words))]
