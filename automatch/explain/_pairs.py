"""Which unexpected key is which missing key, as far as names alone can show it: only by one change that repeats."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from automatch.rules import split_numbers

Row = tuple[int, ...]

# Path segments that a wrapper adds, and who does it.
WRAPPERS = {
    "module": "DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
# Under what names training scripts keep a state_dict beside epoch, optimizer and arguments.
CONTAINERS = frozenset(
    ("state_dict", "model_state_dict", "model", "net", "network", "generator", "ema", "model_ema", "ema_state_dict", "params", "params_ema")
)
BUFFERS = (
    "num_batches_tracked",
    "position_ids",
    "attn_mask",
    "relative_position_index",
    "relative_coords_table",
    "inv_freq",
    "masked_bias",
    "total_ops",
    "total_params",
)


@dataclass(frozen=True, slots=True)
class Renamed:
    """Pairs that one change explains.

    Args:
        kind: "wrapper", "prefix", "shift" or "renamed".
        source: what the change takes away, e.g. ``"module."``.
        target: what it puts there.
        pairs: (checkpoint key, model key).
    """

    kind: str
    source: str
    target: str
    pairs: tuple[tuple[str, str], ...]


def is_buffer(key: str) -> bool:
    """Whether a key is a buffer that libraries recompute, so that it may be missing or left over."""
    return key.rpartition(".")[2] in BUFFERS


def is_statistic(key: str) -> bool:
    """Whether a key holds running statistics of a normalisation layer."""
    return key.rpartition(".")[2] in ("running_mean", "running_var")


def find_renamed(unexpected: Sequence[str], missing: Sequence[str]) -> list[Renamed]:
    """Changes that explain pairs of keys, most certain first; every key is in one pair at most.

    Changes that leave more than half of both lists unexplained are chance likenesses of two architectures: none is given.
    """
    found: list[Renamed] = []
    left_source, left_target = list(dict.fromkeys(unexpected)), list(dict.fromkeys(missing))
    for find in (_wrappers, _prefix, _levels, _shifts):
        for renamed in find(left_source, left_target):
            found.append(renamed)
            used_sources, used_targets = {s for s, _ in renamed.pairs}, {t for _, t in renamed.pairs}
            left_source = [key for key in left_source if key not in used_sources]
            left_target = [key for key in left_target if key not in used_targets]
    pairs = sum(len(renamed.pairs) for renamed in found)
    sources = [key for key in left_source if not is_buffer(key) and not is_statistic(key)]
    targets = [key for key in left_target if not any(explains(renamed, key) for renamed in found)]
    return found if min(len(sources), len(targets)) <= pairs else []


def _unique(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Pairs in which both keys occur once."""
    pairs = list(dict.fromkeys(pairs))
    sources, targets = Counter(source for source, _ in pairs), Counter(target for _, target in pairs)
    return tuple((source, target) for source, target in pairs if sources[source] == targets[target] == 1)


def _joined(sources: Sequence[str], targets: Sequence[str], name: Callable[[str], str]) -> tuple[tuple[str, str], ...]:
    """Pairs with the same name in some normal form."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for target in targets:
        by_name[name(target)].append(target)
    return _unique((source, target) for source in sources for target in by_name.get(name(source), ()))


def _wrappers(sources: Sequence[str], targets: Sequence[str]) -> list[Renamed]:
    def bare(key: str) -> str:
        return ".".join(segment for segment in key.split(".") if segment not in WRAPPERS)

    groups: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for source, target in _joined(sources, targets, bare):
        groups[_difference(source, target)].append((source, target))
    return [Renamed("wrapper", *change, tuple(pairs)) for change, pairs in sorted(groups.items(), key=lambda group: -len(group[1]))]


def _difference(source: str, target: str) -> tuple[str, str]:
    """The prefixes of two keys before their common tail."""
    one, other = source.split("."), target.split(".")
    while len(one) > 1 and len(other) > 1 and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    if one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return "".join(f"{segment}." for segment in one), "".join(f"{segment}." for segment in other)


def _prefix(sources: Sequence[str], targets: Sequence[str]) -> list[Renamed]:
    """One prefix more or less before all keys of the shorter list."""
    best: list[Renamed] = []
    for taken in (True, False):
        longer, shorter = (sources, targets) if taken else (targets, sources)
        known = set(shorter)
        counts: Counter[str] = Counter()
        for key in longer:
            place = key.find(".")
            while place >= 0:
                if key[place + 1 :] in known:
                    counts[key[: place + 1]] += 1
                place = key.find(".", place + 1)
        for prefix, count in counts.most_common(1):
            if 2 * count > min(len(sources), len(targets)):
                pairs = [(prefix + key, key) if taken else (key, prefix + key) for key in shorter if prefix + key in set(longer)]
                best.append(Renamed("prefix", prefix if taken else "", "" if taken else prefix, tuple(pairs)))
    return sorted(best, key=lambda renamed: -len(renamed.pairs))[:1]


def _levels(sources: Sequence[str], targets: Sequence[str]) -> list[Renamed]:
    """One path level more or less somewhere: ``head.weight`` and ``head.fc.weight``."""
    groups: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for taken in (True, False):
        longer, shorter = (sources, targets) if taken else (targets, sources)
        known = set(shorter)
        for key in longer:
            segments = key.split(".")
            for place in range(len(segments) - 1):
                other = ".".join(segments[:place] + segments[place + 1 :])
                if other in known and not segments[place].isdigit():
                    source, target = (key, other) if taken else (other, key)
                    groups[_difference(source, target)].append((source, target))
    unique = set(_unique(pair for pairs in groups.values() for pair in pairs))
    kept = {change: tuple(pair for pair in pairs if pair in unique) for change, pairs in groups.items()}
    return [Renamed("renamed", *change, pairs) for change, pairs in kept.items() if pairs]


def _shifts(sources: Sequence[str], targets: Sequence[str]) -> list[Renamed]:
    """The same name with another number at one place: a layer was put in before, or taken out."""
    others: defaultdict[tuple[tuple[str, ...], int, Row], list[tuple[int, str]]] = defaultdict(list)
    for target in targets:
        texts, numbers = split_numbers(target)
        for place, number in enumerate(numbers):
            others[texts, place, numbers[:place] + numbers[place + 1 :]].append((number, target))
    for row in others.values():
        row.sort()
    groups: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for source in sources:
        texts, numbers = split_numbers(source)
        near = [
            (found[0] - number, place, found[1])
            for place, number in enumerate(numbers)
            for found in _neighbours(others.get((texts, place, numbers[:place] + numbers[place + 1 :]), []), number)
        ]
        if near:
            by, place, target = min(near, key=lambda candidate: (abs(candidate[0]), candidate[1:]))
            head = "".join(text + "*" for text in texts[:place]) + texts[place]
            groups[f"{head}{{i}}", f"{head}{{i{by:+d}}}"].append((source, target))
    unique = set(_unique(pair for pairs in groups.values() for pair in pairs))
    kept = {change: tuple(pair for pair in pairs if pair in unique) for change, pairs in groups.items()}
    return [Renamed("shift", *change, pairs) for change, pairs in sorted(kept.items(), key=lambda group: -len(group[1])) if pairs]


def _neighbours(row: Sequence[tuple[int, str]], number: int) -> list[tuple[int, str]]:
    """The entries of a sorted row with the next smaller and the next larger number."""
    below, above = bisect_left(row, number, key=itemgetter(0)), bisect_right(row, number, key=itemgetter(0))
    return [*row[max(below - 1, 0) : below], *row[above : above + 1]]


def _different(numbers: Row, others: Row) -> list[int]:
    return [place for place, (one, other) in enumerate(zip(numbers, others, strict=True)) if one != other]


def jumps(renamed: Renamed) -> bool:
    """Whether a shift leaps over numbers that no pair names: then all between may have moved by one under their old names."""
    spans = [(_changed(source, target)) for source, target in renamed.pairs]
    ends = {number for span in spans for number in span}
    return any(set(range(min(span) + 1, max(span))) - ends for span in spans)


def _changed(source: str, target: str) -> tuple[int, int]:
    numbers, others = split_numbers(source)[1], split_numbers(target)[1]
    (place,) = _different(numbers, others)
    return numbers[place], others[place]


def explains(renamed: Renamed, target: str) -> bool:
    """Whether a change would also give this model key, from a checkpoint key that a cut message no longer shows."""
    if renamed.kind in ("wrapper", "prefix"):
        return True
    if renamed.kind == "renamed":
        return target.startswith(renamed.target)
    texts, numbers = split_numbers(target)
    for source, made in renamed.pairs:
        known_texts, known = split_numbers(made)
        (place,) = _different(split_numbers(source)[1], known)
        if texts == known_texts and numbers[place] == known[place]:
            return True
    return False
