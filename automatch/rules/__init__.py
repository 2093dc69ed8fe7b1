"""The few rename rules that reproduce a mapping exactly; the first rule that matches a source key decides.

A rule is a prefix change (``module.* → *``), a template with numbers (``layers.{i}.attention.wq.weight →
model.layers.{i}.self_attn.q_proj.weight``), number arithmetic (``{i+1}``), a value table (``{a[i]}``), or any of
these with a transform and several sources or targets. Rules that join tensors come first, then the longer
pattern before the shorter one, so that a general rule stands below its exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from automatch.errors import MappingError, TransformError
from automatch.mapping import KeyMapping, Match
from automatch.rules._apply import Application, applications, apply_rules
from automatch.rules._components import Component, components
from automatch.rules._cover import Literal, cover, cover_joint
from automatch.rules._exceptions import exceptions
from automatch.rules._generalise import Universe, generalise
from automatch.rules._patterns import Index, Pattern, split_numbers
from automatch.rules._rule import Domain, Loop, Output, RenameRule
from automatch.rules._sample import sample, with_explained
from automatch.transforms import Concat, Copy, Slice, Transform, invert

__all__ = [
    "Domain",
    "Index",
    "Loop",
    "Output",
    "Pattern",
    "RenameRule",
    "apply_rules",
    "drop_rules",
    "infer_rules",
    "invert_rules",
    "split_numbers",
]

MANY = 4000
FEW = 64
Shapes = Mapping[str, tuple[int, ...]]


def infer_rules(mapping: KeyMapping) -> tuple[RenameRule, ...]:
    """Find few rules that, applied to the mapping's source keys, give exactly its matches.

    Returns:
        The rules in order of precedence; a key that fits no pattern has a rule of its own.
    """
    spec = mapping.source.spec
    fed = dict.fromkeys(key for match in mapping.matches for key in match.sources)
    try:
        return _rules(mapping.matches, spec.keys if spec else (*fed, *mapping.unexpected_keys))
    finally:
        split_numbers.cache_clear()  # it holds every key and prefix by now


def _rules(matches: Sequence[Match], source_keys: Sequence[str]) -> tuple[RenameRule, ...]:
    parts = components(matches)
    used = {key for part in parts for key in part.sources}
    unused = tuple(Component((key,), (), None, 0, position) for position, key in enumerate(source_keys) if key not in used)
    place = {match.target: position for position, match in enumerate(matches)}
    if len(parts) + len(unused) > MANY and (found := _from_sample((*parts, *unused), matches, source_keys, place)):
        return found
    alone: set[str] = set()
    while True:
        rules, odd = _build_around(parts, unused, alone, source_keys, place)
        stubborn = _differing(applications(rules, source_keys), matches) - alone - odd
        if not stubborn:
            return rules
        alone |= stubborn if len(alone) < len(stubborn) else used.union(source_keys)


def _from_sample(
    parts: Sequence[Component], matches: Sequence[Match], source_keys: Sequence[str], place: Mapping[str, int]
) -> tuple[RenameRule, ...] | None:
    """Rules from a sample, a few exceptions explained singly; None where they do not reproduce the whole mapping."""
    chosen, alone = sample(parts), set[str]()
    for _ in range(2):
        named = [part for part in parts if alone.intersection(part.sources)]
        kept = [*(part for part in chosen if not alone.intersection(part.sources)), *named]
        fed, unfed = [part for part in kept if part.outputs], [part for part in kept if not part.outputs]
        rules, odd = _build_around(fed, unfed, alone, [key for part in kept for key in part.sources], place)
        applied = applications(rules, source_keys)
        differing = _differing(applied, matches)
        if not differing:
            return with_explained(rules, applied, {match.target: match.confidence for match in matches}, place)
        if len(differing) > FEW:
            return None
        alone |= differing | odd
    return None


def _build_around(
    parts: Sequence[Component], unused: Sequence[Component], alone: set[str], source_keys: Sequence[str], place: Mapping[str, int]
) -> tuple[tuple[RenameRule, ...], set[str]]:
    """The rules, and the few further keys that are explained one by one because they break an arithmetic."""
    rules = _build(parts, unused, alone, source_keys, place)
    odd = exceptions(rules) - alone
    if not odd or len(odd) > FEW:
        return rules, set()
    return _build(parts, unused, alone | odd, source_keys, place), odd


def _build(
    parts: Sequence[Component], unused: Sequence[Component], alone: set[str], source_keys: Iterable[str], place: Mapping[str, int]
) -> tuple[RenameRule, ...]:
    """The rules; components with a source in ``alone`` are explained one by one, before all others."""
    singly = [part for part in (*parts, *unused) if alone.intersection(part.sources)]
    together = [part for part in parts if not alone.intersection(part.sources)]
    left_out = [part for part in unused if part.sources[0] not in alone]
    universe = Universe(key for key in source_keys if key not in alone)
    first = [rule for part in singly for rule in generalise([Literal(part.sources, part.outputs, False, [part])], universe, place)]
    joint = generalise(cover_joint([part for part in together if len(part.sources) > 1]), universe, place)
    single = generalise(cover([*(part for part in together if len(part.sources) == 1), *left_out]), universe, place)
    return (*first, *sorted(joint, key=_precedence), *sorted(single, key=_precedence))


def _precedence(rule: RenameRule) -> tuple[int, int, str]:
    pattern = rule.sources[0].items[0]
    return -pattern.depth, -rule.n_keys, str(pattern)


def _differing(applied: Iterable[Application], matches: Sequence[Match]) -> set[str]:
    """Source keys of which the rules make something else than the mapping does."""
    made = {target: (sources, transform) for *_, outputs in applied for target, sources, transform in outputs}
    differing: set[str] = set()
    for match in matches:
        sources, transform = made.pop(match.target, ((), None))
        if sources != match.sources or transform != match.transform:
            differing.update(sources, match.sources)
    return differing.union(*(sources for sources, _ in made.values()))


def invert_rules(rules: Iterable[RenameRule], shapes: Shapes) -> tuple[RenameRule, ...]:
    """Find the rules that lead back: from what the rules make of these source keys to the source keys.

    Args:
        rules: the rules, in order of precedence.
        shapes: the shape of every source key (an element is its size); their order is the order of the keys.

    Raises:
        MappingError: a rule loses values (a slice whose rest is used nowhere, an adaptation), so nothing leads back.
    """
    made = apply_rules(rules, shapes)
    back = {match.target: match for match in _copies_first(made, shapes)}
    return _rules(tuple(back[key] for key in shapes if key in back), [match.target for match in made])


def _copies_first(made: Sequence[Match], shapes: Shapes) -> Iterable[Match]:
    slices: dict[str, list[tuple[Slice, str]]] = {}
    for match in made:
        if isinstance(match.transform, Slice):
            slices.setdefault(match.sources[0], []).append((match.transform, match.target))
            continue
        try:
            inverse = invert(match.transform, [shapes[key] for key in match.sources])
        except TransformError as error:
            raise MappingError(f"the rule for {match.target!r} has no inverse: {error}") from error
        for key, step in zip(match.sources, inverse, strict=True):
            yield Match(key, (match.target,), step, confidence=match.confidence)
    for key, cut in slices.items():
        yield _joined(key, sorted(cut, key=lambda pair: pair[0].start), shapes[key])


def _joined(key: str, cut: list[tuple[Slice, str]], shape: tuple[int, ...]) -> Match:
    dim, end = cut[0][0].dim, 0
    for piece, _ in cut:
        if piece.dim != dim or piece.start != end:
            break
        end += piece.length
    if end != shape[dim]:
        names = ", ".join(target for _, target in cut)
        raise MappingError(
            f"{key!r} of shape {shape} cannot be put together from {names}: what follows {end} along dim {dim} is used nowhere"
        )
    transform: Transform = Concat(dim) if len(cut) > 1 else Copy()
    return Match(key, tuple(target for _, target in cut), transform)


def drop_rules(keys: Iterable[str]) -> tuple[RenameRule, ...]:
    """Rules that name exactly these keys and make nothing of them."""
    keys = tuple(keys)
    parts = [Component((key,), (), None, 0, position) for position, key in enumerate(keys)]
    return tuple(generalise([Literal(part.sources, (), False, [part]) for part in parts], Universe(keys), {}))
