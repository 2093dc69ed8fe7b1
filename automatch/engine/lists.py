"""Questions about lists of repeated modules: do they run forwards or backwards, and which members does a shorter list take."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache

from automatch.engine.names import runs_upward
from automatch.engine.pipeline import Outcome
from automatch.keys import numbers_of, segments_of, template_of
from automatch.mapping import CONFIDENT, Match

DOUBTFUL = 0.15  # share of a list's pairs that must be below CONFIDENT for its direction to be asked
COVERED = 0.8  # share of a list's pairs that another option must be able to feed
SHORT = 0.75  # a list this much shorter than the checkpoint's, or more, may have taken other members than the first
SUBSET_CAP = 0.8  # then nothing but habit says which
_NUMBERED = re.compile(r"\D*\d[^./]*(?=[./])")  # up to the end of a numbered segment that is not the last


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: its label, what it feeds to the keys it settles, and how likely it is."""

    label: str
    matches: Mapping[str, Match]
    confidence: float


@dataclass(frozen=True, slots=True)
class Open:
    """A question: its text, and its choices with the proposal first."""

    text: str
    choices: tuple[Choice, ...]


@dataclass(slots=True)
class _Pairing:
    """The matches that lead from one list of the checkpoint into one of the model, with the member's number on both sides."""

    target: str
    source: str
    members: list[tuple[Match, int, int]]

    def moved(self, outcome: Outcome, number: Callable[[int], int]) -> dict[str, Match]:
        """The matches with the sources of other members: ``number`` of the target's number; only those that exist with the same shape."""
        result = {}
        depth = len(segments_of(self.source)) - 1
        for match, to, _ in self.members:
            segments = segments_of(match.sources[0])
            segments[depth] = segments_of(self.source)[-1].replace("#", str(number(to)))
            key = _joined(match.sources[0], segments)
            if key in outcome.source and outcome.source[key].shape == outcome.source[match.sources[0]].shape:
                result[match.target] = replace(match, sources=(key,), alternatives=())
        return result


def list_questions(outcome: Outcome, current: Mapping[str, Match], by_order: Set[str]) -> list[Open]:
    """Lists that may run backwards, and lists that are shorter than the checkpoint's.

    Keys that could be exchanged with others of their block (`by_order`) leave no doubt about the list.
    """
    held: dict[str, set[int]] = defaultdict(set)
    for key in outcome.source.keys:
        found = _outermost(key)
        if found is not None:
            held[found[0]].add(found[1])
    result = []
    for pairing in _pairings(current):
        found = _subset(outcome, pairing, sorted(held[pairing.source])) or _reversal(outcome, pairing, by_order)
        if found is not None:
            result.append(found)
    return result


def _pairings(current: Mapping[str, Match]) -> list[_Pairing]:
    found: dict[tuple[str, str], _Pairing] = {}
    for match in current.values():
        if len(match.sources) == 1:
            to, of = _outermost(match.target), _outermost(match.sources[0])
            if to is not None and of is not None:
                found.setdefault((to[0], of[0]), _Pairing(to[0], of[0], [])).members.append((match, to[1], of[1]))
    return [pairing for pairing in found.values() if len({to for _, to, _ in pairing.members}) > 1]


def _outermost(key: str) -> tuple[str, int] | None:
    """The first segment of a key with one number in it, the last aside, as ``stem.name#``, and its number; None without one."""
    end = 0
    while head := _NUMBERED.match(key, end):
        end = head.end()
        found = _listed(key[:end])
        if found is not None:
            return found
    return None


@lru_cache(maxsize=1 << 14)
def _listed(head: str) -> tuple[str, int] | None:
    *stem, segment = segments_of(head)
    numbers = numbers_of(segment)
    return (".".join([*stem, template_of(segment)]), numbers[0]) if len(numbers) == 1 else None


def _joined(like: str, segments: Sequence[str]) -> str:
    """Segments put together with the separators of ``like``."""
    separators = [character for character in like if character in "./"]
    return "".join(part for pair in zip(segments, [*separators, ""], strict=True) for part in pair)


def _name(stem: str) -> str:
    """What a list is called: the last segment of its stem that says more than a number."""
    return next((segment for segment in reversed(segments_of(stem)) if segment != "#"), "")


def _numbers(pairing: _Pairing) -> tuple[list[int], list[int]]:
    return sorted({to for _, to, _ in pairing.members}), sorted({of for _, _, of in pairing.members})


def _reversal(outcome: Outcome, pairing: _Pairing, by_order: Set[str]) -> Open | None:
    """Whether the list may run the other way round: some of it is doubtful, and no shape speaks against it."""
    doubtful = sum(match.confidence < CONFIDENT and match.target not in by_order for match, _, _ in pairing.members)
    targets, sources = _numbers(pairing)
    if doubtful < DOUBTFUL * len(pairing.members) or len(targets) != len(sources) or _name(pairing.target) == _name(pairing.source):
        return None
    forwards = dict(zip(targets, sources, strict=True))
    agree = sum(forwards[to] == of for _, to, of in pairing.members)
    backwards = 2 * agree < len(pairing.members)
    if not (backwards or runs_upward(pairing.target) or runs_upward(pairing.source)):
        return None  # stacks of layers are counted from the first one by everybody
    opposite = forwards if backwards else dict(zip(targets, reversed(sources), strict=True))
    other = pairing.moved(outcome, opposite.__getitem__)
    if len(other) < COVERED * len(pairing.members):
        return None
    own = {match.target: match for match, _, _ in pairing.members if match.target in other}
    sure = max(0.5, sum(match.confidence for match in own.values()) / len(own))
    text = f"Do the members of {pairing.source!r} go to those of {pairing.target!r} in this order, or reversed?"
    labels = ("reversed", "in this order") if backwards else ("in this order", "reversed")
    return Open(text, (Choice(labels[0], own, sure), Choice(labels[1], other, 1 - sure)))


def _subset(outcome: Outcome, pairing: _Pairing, have: Sequence[int]) -> Open | None:
    """Which members of a longer list (``have``) a shorter one takes: the first, the last, every other, or spread evenly."""
    targets, _ = _numbers(pairing)
    n = len(targets)
    if len(have) * SHORT < n:
        return None
    proposed = {to: of for _, to, of in pairing.members}
    options: dict[tuple[int, ...], str] = {}
    for label, picked in _habits(len(have), n):
        options.setdefault(tuple(have[i] for i in picked), label)
    first = tuple(proposed[to] for to in targets)
    choices = []
    for picked, label in options.items():
        moved = pairing.moved(outcome, dict(zip(targets, picked, strict=True)).__getitem__)
        if len(moved) == len(pairing.members):
            choices.append((picked != first, label, moved))
    if len(choices) < 2 or choices[0][0]:
        return None
    text = f"The checkpoint has {len(have)} of {pairing.source!r}, the model {n} of {pairing.target!r}: which ones does it take?"
    rest = (1 - SUBSET_CAP) / (len(choices) - 1)
    ranked = sorted(choices, key=lambda choice: choice[0])
    return Open(text, tuple(_choice(label, moved, rest if other else SUBSET_CAP) for other, label, moved in ranked))


def _choice(label: str, matches: Mapping[str, Match], confidence: float) -> Choice:
    held = {key: replace(match, confidence=min(match.confidence, confidence)) for key, match in matches.items()}
    return Choice(label, held, confidence)


def _habits(have: int, n: int) -> list[tuple[str, list[int]]]:
    """The usual ways to take n of a number of layers (the last is DistilBERT's), as labels and positions."""
    step = have // n
    found = [(f"the first {n}", list(range(n))), (f"the last {n}", list(range(have - n, have)))]
    if step > 1:
        some = {2: "every other", 3: "every third"}.get(step, f"one in {step}")
        found.append((f"{some}, from the first", list(range(0, step * n, step))))
        found.append((f"{some}, up to the last", list(range(have - 1 - step * (n - 1), have, step))))
    return [*found, ("evenly, the first and the last among them", [round(i * (have - 1) / (n - 1)) for i in range(n)])]
