"""From an outcome to matches: calibrated confidence, evidence and runners-up for every fed key."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from automatch.engine.assemble import Fed
from automatch.engine.conventions import OTHER_HEAD
from automatch.engine.features import NAMES, pair_features
from automatch.engine.items import shared_ending
from automatch.engine.layout import layout
from automatch.engine.pipeline import Outcome
from automatch.engine.rotary import UNSURE
from automatch.engine.tables import Trees
from automatch.engine.twins import exchangeable, torn
from automatch.keys import segments_of
from automatch.mapping import CONFIDENT, Alternative, Evidence, Match
from automatch.specs import StateSpec
from automatch.transforms import Adapt, Chain, Concat, Copy, PermuteElements

KEEP = 0.4  # below this share of what pairs of the model have on average, a pair is more likely wrong than worth showing
RELATED = 0.15  # on average; below that the two are hardly of one architecture
SURER = 0.2  # of the doubt left at 0.95 and more: of 92,180 such pairs of families left out none was wrong, and 860 were expected
TIED = 0.97  # a key that repeats another's source is nearly as sure as that one
PADDED = 0.8  # the first rows of a padded vocabulary: what is dropped may have been meant
RUNNERS_UP = 3
IDENTICAL, PART, LARGEST = 0.97, 4, 10_000  # a module of four tensors or more that both sides hold once, with the same keys and shapes
MOSTLY = 0.9  # of the fed keys keep their names, so that a name is never an index that was shifted,
FEWEST = 0.1  # if that many of the model's keys are fed: a norm of one name in two architectures says nothing
CERTAIN = 0.999  # every key under its own name, one prefix aside
STRAIGHTENED = (0.55, 0.8)  # a list was torn before, or norms out of order: the evidence of single pairs said otherwise
TORN_CAP = 0.8  # one module fed from two
ONE_LESS = 0.6  # lists of nearly equal length: one that leaves out its end may leave out its start
UPWARD_CAP = 0.8  # lists of decoders and necks under other names: some libraries count them from the other end
STACK_ONLY_CAP = 0.3  # under other names, and what surrounds the repeated blocks stays alone: blocks of any two transformers agree in shape
ALONE = 0.7  # of what surrounds them is matched, at most: 0.42 and 0.6 in unrelated pairs of the corpus, 0.93 in parts of composed models
FEW_KINDS = 6  # shapes of matrices that unrelated pairs have in common at most; stages of several widths do not agree by accident
OTHER_HEAD_CAP = 0.3  # one serves words, the other the whole input
ORDER_CAP = 0.8  # two parts fused under a name that does not say in which order
REGISTERED_CAP = 0.85  # only an order of registration that other pairs contradict, or too few confirm, speaks for the choice
# Doubtful pairs of a part that mostly has no counterpart agree by accident: of the 31 pairs of both corpora that would be
# shown without it (nine cases) six are right; of the ten more that 0.66 would drop, six.
SURROUNDED, STRAY, STRAY_CAP = 0.5, 0.6, 0.2
SPARE_LEAD, SPARE_CAP = 0.02, 0.75  # a partner that stayed alone and means the same: nothing but order speaks for the choice


_SEPARATOR = re.compile(r"[./]")


@dataclass(frozen=True, slots=True)
class Judged:
    """What is worth proposing.

    Args:
        matches: one for every target key that is fed with enough confidence.
        by_order: target keys that only an order tells apart from others.
    """

    matches: tuple[Match, ...]
    by_order: frozenset[str]


def judge(outcome: Outcome, model: Trees) -> Judged:
    """Give every fed key its confidence, and drop those that are not worth proposing."""
    kept, rows = pair_features(outcome)
    values = np.clip(model.probability(rows), 0.001, 0.999) if kept else np.zeros(0)
    alike = exchangeable(outcome)
    average = float(values.mean()) if kept else 0.0
    least = KEEP * average if average >= RELATED else KEEP
    if kept:
        values = _capped(outcome, kept, rows, values, alike)
        values = np.where(values >= CONFIDENT, 1 - SURER * (1 - values), values)
    probability = {j: float(p) for j, p in zip(kept, values, strict=True)}
    doubted = bool(outcome.tied) or any(p < IDENTICAL for p in probability.values())
    identical = _identical_parts(outcome) if doubted else {}
    same_name = _KeptNames(outcome)
    runners, evidences = _RunnersUp(outcome), _Evidences(outcome)
    matches = []
    for fed in outcome.fed:
        deciders = [outcome.decided_by[j][1] for j in fed.items]
        confidence = min((probability[j] for j in deciders), default=PADDED)
        if fed.target in outcome.tied:
            confidence *= TIED
        if _is_unsure(fed):
            confidence = min(confidence, UNSURE)
        if _order_unsaid(fed, outcome.source):
            confidence = min(confidence, ORDER_CAP)
        kept_name = identical.get(fed.target) == fed.sources or fed in same_name
        if kept_name and isinstance(fed.transform, Copy):
            confidence = max(confidence, IDENTICAL)
        if confidence >= least:
            score, evidence = evidences.of(tuple(deciders))
            alternatives = runners.of(fed, confidence)
            matches.append(Match(fed.target, fed.sources, fed.transform, score, round(confidence, 6), evidence, alternatives))
    if _only_prefixes(outcome):
        matches = [replace(match, confidence=max(match.confidence, CERTAIN), alternatives=()) for match in matches]
    by_order = frozenset(fed.target for fed in outcome.fed if alike and any(outcome.decided_by[j][1] in alike for j in fed.items))
    return Judged(tuple(matches), by_order)


class _KeptNames:
    """Keys that kept their names, with modules wrapped around them or taken away, where nearly all keys of the model did."""

    def __init__(self, outcome: Outcome) -> None:
        self._source = outcome.source
        self._mostly = (
            len(outcome.source) <= LARGEST
            and len(outcome.fed) >= FEWEST * len(outcome.target)
            and MOSTLY * len(outcome.fed) <= sum(len(fed.sources) == 1 and _within(fed.target, fed.sources[0]) for fed in outcome.fed)
        )
        used = {key for fed in outcome.fed for key in fed.sources}
        self._spare: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
        if self._mostly:
            for tensor in outcome.source:
                if tensor.key not in used:
                    self._spare[tensor.shape, segments_of(tensor.key)[-1]].append(tensor.key)

    def __contains__(self, fed: Fed) -> bool:
        if not self._mostly or len(fed.sources) != 1 or not _within(fed.target, fed.sources[0]):
            return False
        rivals = self._spare.get((self._source[fed.sources[0]].shape, segments_of(fed.sources[0])[-1]), ())
        return not any(_within(fed.target, key) for key in rivals)


def _within(target: str, source: str) -> bool:
    """Whether the segments of one of two keys stand in the other in their order."""
    one, two = sorted((segments_of(target), segments_of(source)), key=len)
    rest = iter(two)
    return len(one) > 1 and all(segment in rest for segment in one)


def _identical_parts(outcome: Outcome) -> dict[str, tuple[str]]:
    """Target key to source key within modules that hold the same keys and shapes on both sides, and nowhere else."""
    left, right = _modules(outcome.source), _modules(outcome.target)
    result: dict[str, tuple[str]] = {}
    for content, paths in right.items():
        others = left.get(content, [])
        if len(content) >= PART and len(paths) == len(others) == 1 and _is_telling(content):
            for rest, _ in content:
                result[paths[0] + rest] = (others[0] + rest,)
    return result


def _is_telling(content: frozenset[tuple[str, tuple[int, ...]]]) -> bool:
    """Whether a module is more than a norm, a layer of a library or a bare list, which are alike in models that are not."""
    matrices = sum(len(shape) > 1 for _, shape in content)
    nested = any(len(segments_of(rest)) > 1 for rest, _ in content)
    return matrices > 1 and nested and not all(segments_of(rest)[0].isdigit() for rest, _ in content)


def _modules(spec: StateSpec) -> dict[frozenset[tuple[str, tuple[int, ...]]], list[str]]:
    """Every module by what it holds: relative keys with shapes, to the paths (with the separator) at which it stands."""
    if len(spec) > LARGEST:
        return {}
    content: dict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for tensor in spec:
        key = tensor.key
        content[""].append((key, tensor.shape))
        for separator in _SEPARATOR.finditer(key):
            content[key[: separator.end()]].append((key[separator.end() :], tensor.shape))
    found: dict[frozenset[tuple[str, tuple[int, ...]]], list[str]] = defaultdict(list)
    for path, entries in content.items():
        found[frozenset(entries)].append(path)
    return found


def _only_prefixes(outcome: Outcome) -> bool:
    """Whether every key of the model is fed unchanged by the key of its own name, but for one prefix on either side."""
    changes = set()
    for fed in outcome.fed:
        a, b = fed.sources[0], fed.target
        same = shared_ending([a, b])
        changes.add((a[: len(a) - same], b[: len(b) - same]))
        if not isinstance(fed.transform, Copy) or len(changes) > 1:
            return False
    whole = {fed.target for fed in outcome.fed} == set(outcome.target.keys)
    return whole and all(not part or part.endswith((".", "/")) for change in changes for part in change)


def _capped(outcome: Outcome, kept: Sequence[int], rows: np.ndarray, values: np.ndarray, by_order: Set[int]) -> np.ndarray:
    """Hold down what only order speaks for: spare partners, lists that may run backwards, exchangeable pairs of a block."""
    column = {name: rows[:, i] for i, name in enumerate(NAMES)}
    stack_only = (column["mean_name"] < 0.7) & (column["cover_t"] < 0.95) & (column["around"] <= ALONE)
    stack_only &= column["shape_kinds"] <= np.log1p(FEW_KINDS) / 4
    values = np.where(stack_only, np.minimum(values, STACK_ONLY_CAP), values)
    stray = (np.minimum(column["home_t"], column["home_s"]) < SURROUNDED) & (values < STRAY)
    values = np.where(stray, np.minimum(values, STRAY_CAP), values)
    spare = np.minimum(column["spare_t"], column["spare_s"]) <= SPARE_LEAD
    backwards = (column["upward"] > 0) & (
        (column["list_name"] == 0) & (column["twins"] > 0.4) | (column["count"] > ONE_LESS) & (column["count"] < 1)
    )
    values = np.where(column["region"] <= -1 - 0.5 * OTHER_HEAD, np.minimum(values, OTHER_HEAD_CAP), values)
    alike = np.array([j in by_order for j in kept])
    apart = torn(outcome)
    values = np.where([j in apart for j in kept], np.minimum(values, TORN_CAP), values)
    registered = outcome.sides[0].order == outcome.sides[1].order == "registered"
    values = np.where(spare, np.minimum(values, SPARE_CAP), values)
    values = np.where(alike, np.minimum(values, REGISTERED_CAP if registered else SPARE_CAP), values)
    values = np.where([j in outcome.straightened for j in kept], np.clip(values, *STRAIGHTENED), values)
    return np.where(backwards, np.minimum(values, UPWARD_CAP), values)


def _is_unsure(fed: Fed) -> bool:
    steps = fed.transform.steps if isinstance(fed.transform, Chain) else (fed.transform,)
    return any(isinstance(step, (PermuteElements, Adapt)) for step in steps)  # a union would be made anew each time


def _order_unsaid(fed: Fed, source: StateSpec) -> bool:
    if not isinstance(fed.transform, Concat) or len(fed.sources) != 2 or len({source[key].shape for key in fed.sources}) > 1:
        return False
    words = fed.target.lower()
    return not any(word in words for word in ("gate", "kv", "w13", "w12", "qkv", "key_value"))


class _Evidences:
    """The evidence of a match, from the pairs that decided it; computed once for all keys that the same pairs decide."""

    def __init__(self, outcome: Outcome) -> None:
        found, n = outcome.solution.evidence, len(outcome.solution.t)
        zero = np.zeros(n)
        context = (found.get("node", zero) + found.get("template", zero) + found.get("suffix", zero)) / 2
        self._columns = np.stack(
            [
                outcome.solution.score,
                found.get("name", zero),
                0.5 + 0.5 * found.get("layout", zero),
                np.clip(0.5 + 0.5 * found.get("rank", zero), 0, 1),
                np.clip(context, 0, 1),
            ]
        )
        self._pair_of = outcome.pair_of
        self._known: dict[tuple[int, ...], tuple[float, Evidence]] = {}

    def of(self, deciders: tuple[int, ...]) -> tuple[float, Evidence]:
        """The raw score and the evidence."""
        if not deciders:
            return 0.0, Evidence()
        if deciders not in self._known:
            score, name, shape, order, context = self._columns[:, [self._pair_of[j] for j in deciders]].mean(1).tolist()
            evidence = Evidence(round(name, 4), round(shape, 4), 1.0, round(order, 4), round(context, 4))
            self._known[deciders] = (round(score, 6), evidence)
        return self._known[deciders]


class _RunnersUp:
    """The best other sources of a key, for keys that are one item on both sides and took part in solving."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._position = {j: k for k, j in enumerate(outcome.reduction.target_kept)}
        self._pairs: dict[int, list[int]] = defaultdict(list)
        for k, t in enumerate(outcome.solution.t.tolist()):
            self._pairs[t].append(k)

    def of(self, fed: Fed, confidence: float) -> tuple[Alternative, ...]:
        outcome, j = self._outcome, fed.items[0] if len(fed.items) == 1 else -1
        if j not in self._position or fed.target in outcome.tied:
            return ()
        solution, chosen = outcome.solution, outcome.pair_of.get(j)
        others = [k for k in self._pairs[self._position[j]] if k != chosen and solution.score[k] > 0]
        others.sort(key=lambda k: (-solution.score[k], k))
        scores = np.array([solution.score[k] for k in others[:RUNNERS_UP]])
        if not len(scores):
            return ()
        share = np.exp(scores - scores.max())
        left = (1.0 - confidence) * share / share.sum()
        found = []
        for k, p in zip(others, left, strict=False):
            item = outcome.source_items[outcome.reduction.source_kept[int(solution.s[k])]]
            between = layout(item.shape, outcome.target_items[j].shape)
            if between is not None and len(item.reals) == 1 and item.shape == outcome.source[item.reals[0]].shape:
                found.append(Alternative(item.reals, between, round(float(p), 6)))
        return tuple(found)
