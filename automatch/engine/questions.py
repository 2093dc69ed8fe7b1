"""Few decisions that settle many keys: choices in which nothing but order speaks for what was chosen.

Beside those about lists (`automatch.engine.lists`), three kinds are found on the solved items and then carried over to all keys:

- *exchange*: two kinds of keys (``w1``/``w3`` in all layers) whose sources could be exchanged;
- *copy*: the sources lie in a module that has a twin which feeds nothing (two encoders, an average);
- *order*: two parts are fused under a name that does not say in which order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from automatch.engine.confidence import Judged
from automatch.engine.lists import Choice, Open, list_questions
from automatch.engine.pipeline import Outcome
from automatch.keys import pieces_of, segments_of, template_of
from automatch.mapping import CONFIDENT, Match, Option, Question

UNSETTLED = 0.8  # a key that hangs on a question is not loaded before it is answered
MOST = 12  # more open questions than a person would answer are not asked
_Two = tuple[str, str]
EXCHANGE_LEAD = 3.0  # of the score, out of about 25


def find_questions(outcome: Outcome, judged: Judged) -> tuple[Question, ...]:
    """The open questions, those on which most keys hang first."""
    current = {match.target: match for match in judged.matches}
    found = [
        *_copies(outcome, current),
        *_orders(outcome, current),
        *_exchanges(outcome, current, judged.by_order),
        *list_questions(outcome, current, judged.by_order),
    ]
    found.sort(key=lambda o: -len(o.choices[-1].matches))
    questions, settled = [], set[str]()
    for item in found:
        keys = [key for key in item.choices[-1].matches if key in current]
        if not keys or settled & set(keys) or len(questions) == MOST:
            continue
        settled.update(keys)
        options = tuple(Option(c.label, tuple(_open(c.matches[key]) for key in keys), round(c.confidence, 6)) for c in item.choices)
        questions.append(Question(f"q{len(questions) + 1}", f"{item.text} {len(keys)} keys hang on it.", options, tuple(keys)))
    return tuple(questions)


def _open(match: Match) -> Match:
    """A match that an answer may still overthrow is never sure."""
    return replace(match, confidence=min(match.confidence, UNSETTLED))


def _either(text: str, labels: tuple[str, str], own: Mapping[str, Match], other: Mapping[str, Match], confidence: float) -> Open:
    """A question with two answers, the first of which is the proposal."""
    shared = {key: own[key] for key in other if key in own}
    return Open(text, (Choice(labels[0], shared, confidence), Choice(labels[1], other, 1 - confidence)))


def _mean(matches: Iterable[Match]) -> float:
    values = [match.confidence for match in matches]
    return float(np.mean(values)) if values else 0.0


# ---- a twin module that feeds nothing ----------------------------------------------------------------------------


def _copies(outcome: Outcome, current: Mapping[str, Match]) -> list[Open]:
    """Two prefixes of the checkpoint that hold the same keys and shapes, when the model takes only one of them."""
    used = {key for match in current.values() for key in match.sources}
    spare: dict[tuple[str, tuple[int, ...]], list[tuple[str, str]]] = defaultdict(list)
    for tensor in outcome.source:
        if tensor.key not in used:
            for prefix, rest in _cuts(tensor.key):
                spare[rest, tensor.shape].append((prefix, tensor.key))
    choices: dict[tuple[str, str], dict[str, tuple[Match, Match]]] = defaultdict(dict)
    for match in current.values():
        if len(match.sources) != 1 or match.confidence >= CONFIDENT:
            continue
        own = match.sources[0]
        for prefix, rest in _cuts(own):
            for other, twin in spare.get((rest, outcome.source[own].shape), ()):
                swapped = replace(match, sources=(twin,), alternatives=())
                pair = (match, swapped) if prefix < other else (swapped, match)
                choices[min(prefix, other), max(prefix, other)][match.target] = pair
    first = {key: n for n, key in enumerate(outcome.source.keys)}
    result = []
    for (a, b), pairs in choices.items():
        if len(pairs) < 4 or template_of(a) == template_of(b):  # members of one list: a question of its own
            continue
        sides = ({t: x for t, (x, _) in pairs.items()}, {t: y for t, (_, y) in pairs.items()})
        leads = _earliest(sides[0], first) < _earliest(sides[1], first)  # nothing but the order in the file speaks for either
        one, two, names = (sides[0], sides[1], (a, b)) if leads else (sides[1], sides[0], (b, a))
        text = f"The checkpoint holds {names[0]!r} and {names[1]!r}, alike in names and shapes: which one does the model take?"
        result.append(_either(text, names, one, two, 0.5))
    return _largest_only(result)


def _cuts(key: str) -> list[tuple[str, str]]:
    segments = segments_of(key)
    return [(".".join(segments[:depth]), "/".join(segments[depth:])) for depth in range(1, min(5, len(segments)))]


def _earliest(matches: Mapping[str, Match], position: Mapping[str, int]) -> int:
    return min(position[m.sources[0]] for m in matches.values())


def _largest_only(found: Sequence[Open]) -> list[Open]:
    """Of questions about the same keys, the one that settles most."""
    result: list[Open] = []
    for item in sorted(found, key=lambda o: -len(o.choices[-1].matches)):
        if not any(item.choices[-1].matches.keys() & kept.choices[-1].matches.keys() for kept in result):
            result.append(item)
    return result


# ---- the order of fused parts --------------------------------------------------------------------------------------


def _orders(outcome: Outcome, current: Mapping[str, Match]) -> list[Open]:
    """Doubtful concatenations of two equal parts: the other order (``kv`` is twice as long as ``q``, and nobody fuses it first)."""
    kinds: dict[str, dict[str, Match]] = defaultdict(dict)
    for match in current.values():
        if match.transform.op != "concat" or len(match.sources) != 2 or match.confidence >= CONFIDENT:
            continue
        if outcome.source[match.sources[0]].shape == outcome.source[match.sources[1]].shape:
            kinds[template_of(match.target)][match.target] = replace(match, sources=match.sources[::-1], alternatives=())
    result = []
    for kind, other in kinds.items():
        a, b = (_module(template_of(key)) for key in next(iter(other.values())).sources[::-1])
        text = f"In which order are {a!r} and {b!r} fused in {kind!r}?"
        result.append(_either(text, (f"{a}, {b}", f"{b}, {a}"), current, other, _mean(current[key] for key in other)))
    return result


# ---- two kinds that could be exchanged -----------------------------------------------------------------------------


def _exchanges(outcome: Outcome, current: Mapping[str, Match], by_order: Set[str]) -> list[Open]:
    """Pairs of target kinds whose sources fit each other nearly as well as their own."""
    alike = list(_alike(outcome, current.values(), lambda match: (_kind(match.target), "")))
    score = _scores(outcome) if alike else {}
    pairs: dict[_Two, dict[str, Match]] = defaultdict(dict)
    for a, b in alike:
        if _costs_little(a, b, score, by_order):
            pairs[_modules(a, b)].update(_swapped(a, b))
    asked = {key for swapped in pairs.values() for key in swapped}
    open_ = [match for key, match in current.items() if key not in asked and match.confidence < UNSETTLED]
    for a, b in _alike(outcome, open_, lambda match: (_kind(match.target), _kind(match.sources[0]))):
        if len(a) > 1 and _are_numbered(a[0].sources[0], b[0].sources[0]) and not _are_numbered(a[0].target, b[0].target):
            pairs[_modules(a, b)].update(_swapped(a, b))
    decisions: dict[tuple[_Two, _Two], list[tuple[_Two, _Two, dict[str, Match]]]] = defaultdict(list)
    for targets, other in pairs.items():
        if not other:
            continue
        sources = _source_modules(current, other)
        at, of = _telling(targets), _telling(sources)
        if at is not None and at == of:
            continue  # the names say which is which
        decision = (targets, sources) if at is None or of is None else min((at, of), ((at[1], at[0]), (of[1], of[0])))
        decisions[decision].append((targets, sources, other))
    result = []
    for decision, parts in decisions.items():
        (a, b), (left, right), _ = parts[0]
        instance = f" (for instance {left!r} to {a!r})" if len(parts) > 1 else ""
        if len(parts) > 1:
            (a, b), (left, right) = decision
        other = {key: match for _, _, swapped in parts for key, match in swapped.items()}
        text = f"Do {left!r} and {right!r} go to {a!r} and {b!r}{instance} in this order, or the other way round?"
        labels = (f"{left} → {a}, {right} → {b}", f"{right} → {a}, {left} → {b}")
        result.append(_either(text, labels, current, other, max(0.5, _mean(current[key] for key in other))))
    return result


def _alike(
    outcome: Outcome, matches: Iterable[Match], kind_of: Callable[[Match], _Two]
) -> Iterator[tuple[Sequence[Match], Sequence[Match]]]:
    """Every two kinds of doubtful matches that are as many, and of the same shapes."""
    kinds: dict[_Two, list[Match]] = defaultdict(list)
    for match in matches:
        if len(match.sources) == 1 and match.transform.op in ("copy", "permute", "reshape"):
            kinds[kind_of(match)].append(match)
    by_shape: dict[tuple[object, ...], list[_Two]] = defaultdict(list)
    for kind in sorted(kind for kind, members in kinds.items() if min(m.confidence for m in members) < CONFIDENT):
        signature = tuple(sorted({outcome.target[m.target].shape for m in kinds[kind]}))
        by_shape[signature, len(kinds[kind])].append(kind)
    for members in by_shape.values():
        for i, a in enumerate(members[:40]):
            for b in members[i + 1 : 40]:
                yield kinds[a], kinds[b]


def _are_numbered(one: str, two: str) -> bool:
    """Whether two keys lie side by side in modules that only a number in their names tells apart (``norm1`` and ``norm2`` of a block)."""
    a, b = segments_of(_kind(one)), segments_of(_kind(two))
    return a != b and template_of(one) == template_of(two) and a[:-2] == b[:-2]


def _telling(modules: _Two) -> _Two | None:
    """The one word, or else the one segment, in which two modules differ; None if they differ in more, or in a number."""
    one, two = map(segments_of, modules)
    segments = [(a, b) for a, b in zip(one, two, strict=False) if a != b]
    if len(one) != len(two) or len(segments) != 1 or template_of(segments[0][0]) == template_of(segments[0][1]):
        return None
    words = [(a, b) for a, b in zip(*map(pieces_of, segments[0]), strict=False) if a != b]
    same_length = len(pieces_of(segments[0][0])) == len(pieces_of(segments[0][1]))
    if same_length and len(words) == 1 and all(isinstance(word, str) for word in words[0]):
        return str(words[0][0]), str(words[0][1])
    return segments[0]


def _kind(key: str) -> str:
    """The key with the numbers of lists taken out; those of names (``norm1``) say which entry of a block it is."""
    return ".".join("#" if segment.isdigit() else segment for segment in segments_of(key))


def _apart(one: str, two: str) -> tuple[str, str]:
    """Two kinds in which only those numbers are left that tell them apart."""
    a, b = (re.split(r"(\d+)", kind) for kind in (one, two))
    if len(a) == len(b):
        same = [x == y and x.isdigit() for x, y in zip(a, b, strict=True)]
        a, b = (["#" if alike else part for part, alike in zip(parts, same, strict=True)] for parts in (a, b))
    return "".join(a), "".join(b)


def _scores(outcome: Outcome) -> Mapping[tuple[str, str], float]:
    left, right = outcome.sides
    solution = outcome.solution
    return {
        (right.items[t].reals[0], left.items[s].reals[0]): score
        for t, s, score in zip(solution.t.tolist(), solution.s.tolist(), solution.score.tolist(), strict=True)
    }


def _swapped(a: Sequence[Match], b: Sequence[Match]) -> dict[str, Match]:
    """The matches after exchanging the sources of two kinds member by member, if that is an exchange at all."""
    if any(x.sources == y.sources for x, y in zip(a, b, strict=True)):
        return {}  # tied: exchanging changes nothing
    if {_leaf(x.target) for x in (a[0], b[0])} == {_leaf(x.sources[0]) for x in (a[0], b[0])} and _leaf(a[0].target) != _leaf(b[0].target):
        return {}  # a weight and a bias, each under its own name
    result: dict[str, Match] = {}
    for x, y in zip(a, b, strict=True):
        result[x.target] = replace(x, sources=y.sources, transform=y.transform, alternatives=())
        result[y.target] = replace(y, sources=x.sources, transform=x.transform, alternatives=())
    return result


def _costs_little(a: Sequence[Match], b: Sequence[Match], score: Mapping[_Two, float], by_order: Set[str]) -> bool:
    """Whether the scores hardly fall if two kinds exchange their sources, or only order speaks against it."""
    loss, count = 0.0, 0
    for x, y in zip(a, b, strict=True):
        crossed = [score.get((x.target, y.sources[0])), score.get((y.target, x.sources[0]))]
        if None not in crossed:
            own = score.get((x.target, x.sources[0]), x.score) + score.get((y.target, y.sources[0]), y.score)
            loss += own - sum(value for value in crossed if value is not None)
            count += 1
    return count > 0 and (all(match.target in by_order for match in (*a, *b)) or loss / count < 2 * EXCHANGE_LEAD)


def _modules(a: Sequence[Match], b: Sequence[Match]) -> _Two:
    """The modules of two kinds of target keys, as far as they tell them apart."""
    return _apart(_module(_kind(a[0].target)), _module(_kind(b[0].target)))


def _module(kind: str) -> str:
    return kind.rpartition(".")[0] or kind


def _leaf(key: str) -> str:
    return segments_of(key)[-1]


def _source_modules(current: Mapping[str, Match], other: Mapping[str, Match]) -> tuple[str, str]:
    first = next(iter(other))
    return _apart(_module(_kind(current[first].sources[0])), _module(_kind(other[first].sources[0])))
