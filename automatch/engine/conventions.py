"""What names mean: areas and parts of a network recognised in a key's words, from a readable table."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from automatch.engine.items import canonical
from automatch.engine.sides import Node, Side
from automatch.keys import pieces_of

Alias = tuple[tuple[str, ...], tuple[str, ...], str, str]  # context words, words, area, part


OTHER_NORM = {"norm first": "norm second", "norm second": "norm first"}
OTHER_GATED = {"mlp up": "mlp down", "mlp down": "mlp up"}
OTHER_HEAD = 2.0  # the pooler is never what stands before the words' output layer, however alike their shapes are
Label = tuple[tuple[str, str] | None, tuple[str | None, ...]]


@dataclass(frozen=True, slots=True)
class Conventions:
    """Aliases by their last word; regions likewise."""

    areas: Mapping[str, tuple[Alias, ...]]
    regions: Mapping[str, Mapping[str, tuple[Alias, ...]]]
    sets: tuple[Mapping[str, str], ...]


def read_conventions(data: Mapping[str, Any]) -> Conventions:
    """Build the look-up from the table's JSON form."""
    regions = {name: _by_last_word(name, parts) for name, parts in data["regions"].items()}
    areas: dict[str, list[Alias]] = {}
    for area, parts in data["areas"].items():
        for word, aliases in _by_last_word(area, parts).items():
            areas.setdefault(word, []).extend(aliases)
    return Conventions({word: tuple(aliases) for word, aliases in areas.items()}, regions, tuple(data["sets"]))


def _by_last_word(area: str, parts: Mapping[str, Iterable[str]]) -> dict[str, tuple[Alias, ...]]:
    found: dict[str, list[Alias]] = {}
    for part, aliases in parts.items():
        for alias in aliases:
            before, _, words = alias.rpartition(">")
            run = tuple(words.split())
            found.setdefault(run[-1], []).append((tuple(before.split()), run, area, part))
    return {word: tuple(aliases) for word, aliases in found.items()}


@lru_cache(maxsize=1)
def shipped_conventions() -> Conventions:
    """The table that comes with automatch."""
    return read_conventions(json.loads(files("automatch.engine").joinpath("data/conventions.json").read_text()))


def words_in_order(side: Side, i: int, numbered: Container[str]) -> tuple[str, ...]:
    """The words of an item's key in order: loop numbers left out, but for those of ``numbered``; name numbers glued to their word."""
    words: list[str] = []
    for depth, segment in enumerate(side.segments[i]):
        loop = depth + 1 < len(side.paths[i]) and side.paths[i][depth + 1] in side.loop_nodes
        words.extend(segment_words(segment, loop=loop and segment not in numbered))
    return tuple(words)


def numbered_words(table: Conventions) -> frozenset[str]:
    """The words of regions that end in a number which is no count (diffusers' ``attn1`` and ``attn2``)."""
    return frozenset(word for aliases in table.regions.values() for word in aliases if word[-1].isdigit())


_COMPOUNDS = {"layernorm": ("layer", "norm"), "feedforward": ("feed", "forward")}  # written as one word or as two


@lru_cache(maxsize=1 << 14)
def segment_words(segment: str, *, loop: bool) -> tuple[str, ...]:
    """The words of one segment; the number of a loop (a list of repeated modules) is left out, others are glued to their word."""
    words: list[str] = []
    for piece in pieces_of(segment):
        if isinstance(piece, str):
            words.extend(_COMPOUNDS.get(piece, (piece,)))
        elif not loop and words:
            words[-1] += str(piece)
        elif not loop:
            words.append(str(piece))
    return tuple(words)


LISTED = ("0", "1", "2", "3")
ATTENTIONS = frozenset(("attn", "attention", "att", "mha"))
LEAVES = frozenset(
    (
        "weight",
        "bias",
        "kernel",
        "gamma",
        "beta",
        "scale",
        "running",
        "mean",
        "var",
        "moving",
        "variance",
        "embedding",
        "w",
        "b",
        "embeddings",
        "gain",
    )
)


def concept(words: tuple[str, ...], table: Conventions) -> tuple[str, str] | None:
    """The (area, part) that the words name, or None: the alias that ends last, then the longest, wins."""
    end = len(words)
    while end > 1 and words[end - 1] in LEAVES:
        end -= 1
    for stop in range(len(words), max(0, end - 2), -1):
        best, longest = None, 0.0
        for context, run, area, part in table.areas.get(words[stop - 1], ()):
            start = stop - len(run)
            length = len(run) + 0.5 * len(context)
            if start >= 0 and length > longest and words[start:stop] == run and (not context or _contains(words[:start], context)):
                best, longest = (area, part), length
        if best is not None:
            return best
    return None


def sibling_concepts(side: Side, table: Conventions) -> dict[tuple[int, str], tuple[str, str]]:
    """(node of the parent, child segment) to (area, part), where the children of a module form a known set together."""
    result: dict[tuple[int, str], tuple[str, str]] = {}
    for node in side.nodes:
        names = {"".join(map(str, pieces_of(segment))): segment for segment in node.children}
        for known in table.sets:
            if known.keys() <= names.keys() and not any((node.id, names[name]) in result for name in known):
                turned = side.order == "registered" and _turned(list(node.children), [names[name] for name in known], table)
                other = OTHER_NORM if turned else OTHER_GATED if _is_down_last(side, node, {known[n]: names[n] for n in known}) else {}
                for name, meaning in known.items():
                    area, _, part = other.get(meaning, meaning).partition(" ")
                    result.setdefault((node.id, names[name]), (area, part))
        if len(node.children) in (3, 4) and _is_listed_attention(side, node):
            for segment, part in zip(LISTED, ("q", "k", "v", "out"), strict=True):
                if segment in node.children:
                    result[node.id, segment] = ("attention", part)
    return result


def _is_down_last(side: Side, node: Node, named: Mapping[str, str]) -> bool:
    """Whether shapes say that what is usually called the way up of a gated mlp is the way down (EVA's ``w1``, ``w2``, ``w3``)."""
    if not OTHER_GATED.keys() < named.keys():
        return False
    gate, up, down = (
        {side.shapes[i] for i in node.children[named[part]].keys if len(side.shapes[i]) > 1} for part in ("mlp gate", "mlp up", "mlp down")
    )
    return gate == down != up


def _is_listed_attention(side: Side, node: Node) -> bool:
    """Whether a list in an attention holds equal projections: queries, keys, values, and perhaps the output (the Annotated Transformer)."""
    if set(node.children) != set(LISTED[: len(node.children)]):
        return False
    one = node.keys[0]
    around = side.segments[one][: side.paths[one].index(node.id)][-3:]
    words = {word for segment in around for word in segment_words(segment, loop=False)}
    shapes = [sorted(canonical(side.shapes[i]) for i in child.keys) for child in node.children.values()]
    return bool(words & ATTENTIONS) and max(map(len, shapes[0])) > 1 and all(found == shapes[0] for found in shapes)


def _turned(children: Sequence[str], norms: Sequence[str], table: Conventions) -> bool:
    """Whether the first two of numbered norms are registered beside the attentions so that the first is that of the cross attention."""
    if not all(name[-1].isdigit() for name in norms):
        return False
    branch = [_attention(segment, table) for segment in children]
    places = [children.index(name) for name in norms[:2]]
    first = next((place for place, kind in enumerate(branch) if kind), 0)
    step = 1 if min(places) < first else -1  # a norm stands before what it feeds, or behind what feeds it
    return [branch[place + step] if 0 <= place + step < len(branch) else None for place in places] == ["cross", "self"]


def _attention(segment: str, table: Conventions) -> str | None:
    return _region(segment_words(segment, loop=False), table.regions["branch"])


def numbered_norms(side: Side, table: Conventions) -> set[int]:
    """Items of norms that have but numbers beside two kinds of attention, in an order that does not say which is whose."""
    if side.order == "registered":
        return set()
    found: set[int] = set()
    sets = [known for known in table.sets if OTHER_NORM.keys() <= set(known.values()) and all(name[-1].isdigit() for name in known)]
    for node in side.nodes:
        if {"self", "cross"} <= {_attention(segment, table) for segment in node.children}:
            names = {"".join(map(str, pieces_of(segment))): child for segment, child in node.children.items()}
            for known in sets:
                if known.keys() <= names.keys():
                    found.update(i for name, meaning in known.items() if meaning in OTHER_NORM for i in names[name].keys)
    return found


def regions(words: tuple[str, ...], table: Conventions) -> tuple[str | None, ...]:
    """For every kind of region (stack, modality, branch) the one the words name first, or None."""
    return tuple(_region(words, aliases) for aliases in table.regions.values())


def _region(words: tuple[str, ...], aliases: Mapping[str, tuple[Alias, ...]]) -> str | None:
    for stop in range(1, len(words) + 1):
        for _, run, _, part in aliases.get(words[stop - 1], ()):
            if words[max(0, stop - len(run)) : stop] == run:
                return part
    return None


def _contains(words: tuple[str, ...], run: tuple[str, ...]) -> bool:
    return any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


def concept_evidence(source: Side, target: Side, t: np.ndarray, s: np.ndarray, table: Conventions) -> tuple[np.ndarray, np.ndarray]:
    """Agreement in [-1, 1] of what the names of each pair mean, and of the regions they lie in (less for two different heads)."""
    numbered = numbered_words(table)
    names_t = [words_in_order(target, j, numbered) for j in range(target.n)]
    names_s = [words_in_order(source, i, numbered) for i in range(source.n)]
    known = {name: (concept(name, table), regions(name, table)) for name in dict.fromkeys((*names_t, *names_s))}
    labels_t, labels_s = _labels(target, names_t, known, table), _labels(source, names_s, known, table)
    unique = {label: n for n, label in enumerate(dict.fromkeys((*labels_t, *labels_s)))}
    heads = list(table.regions).index("head")
    agree = np.zeros((len(unique), len(unique)))
    where = np.zeros((len(unique), len(unique)))
    for a, i in unique.items():
        for b, j in unique.items():
            agree[i, j] = _agreement(a[0], b[0])
            where[i, j] = max(-1.0, min(1.0, sum(_region_agreement(x, y) for x, y in zip(a[1], b[1], strict=True))))
            where[i, j] -= OTHER_HEAD * (a[1][heads] is not None and b[1][heads] is not None and a[1][heads] != b[1][heads])
    of_t = np.array([unique[label] for label in labels_t])
    of_s = np.array([unique[label] for label in labels_s])
    return agree[of_t[t], of_s[s]], where[of_t[t], of_s[s]]


def _labels(side: Side, names: Sequence[tuple[str, ...]], known: Mapping[tuple[str, ...], Label], table: Conventions) -> list[Label]:
    sets = sibling_concepts(side, table)
    labels = []
    for i, name in enumerate(names):
        path, segments = side.paths[i], side.segments[i]
        found = sets.get((path[-2], segments[-2])) if len(path) > 1 else None
        labels.append((found, known[name][1]) if found else known[name])
    return _branches(side, labels, list(table.regions).index("branch"))


def _branches(side: Side, labels: list[Label], kind: int) -> list[Label]:
    """Give an item without a region of this kind the only one that its module's other entries have."""
    around: dict[int, set[str]] = {}
    for path, (_, where) in zip(side.paths, labels, strict=True):
        region = where[kind]
        if region is not None:
            for node in path[-3:]:
                around.setdefault(node, set()).add(region)
    result = []
    for path, (meaning, where) in zip(side.paths, labels, strict=True):
        found = around.get(path[-2] if len(path) > 1 else -1, set())
        if where[kind] is None and len(found) == 1:
            where = (*where[:kind], next(iter(found)), *where[kind + 1 :])
        result.append((meaning, where))
    return result


def _region_agreement(a: str | None, b: str | None) -> float:
    """1 for the same region, -1 for two different ones; the second stream of a model is named, the first often not."""
    if a is None or b is None:
        return -0.5 if "context" in (a, b) else 0.0
    return 1.0 if a == b else -1.0


def _agreement(a: tuple[str, str] | None, b: tuple[str, str] | None) -> float:
    if a is None or b is None:
        return 0.0
    if a == b:
        return 1.0
    return -1.0 if a[0] == b[0] else -0.7
