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
from automatch.rules._apply import apply_rules
from automatch.rules._components import Component, components
from automatch.rules._cover import Literal, cover, cover_joint
from automatch.rules._generalise import Universe, generalise
from automatch.rules._patterns import Index, Pattern, split_numbers
from automatch.rules._rule import Domain, Loop, Output, RenameRule
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
    universe = Universe(source_keys)
    alone: set[str] = set()
    while True:
        rules = _build(parts, unused, alone, universe, place)
        stubborn = _differing(rules, matches, source_keys) - alone
        if not stubborn:
            return rules
        alone |= stubborn if len(alone) < len(stubborn) else used.union(source_keys)


def _build(
    parts: Sequence[Component], unused: Sequence[Component], alone: set[str], universe: Universe, place: Mapping[str, int]
) -> tuple[RenameRule, ...]:
    """The rules; components with a source in ``alone`` are explained one by one, before all others."""
    singly = [part for part in (*parts, *unused) if alone.intersection(part.sources)]
    together = [part for part in parts if not alone.intersection(part.sources)]
    left_out = [part for part in unused if part.sources[0] not in alone]
    first = [rule for part in singly for rule in generalise([Literal(part.sources, part.outputs, False, [part])], universe, place)]
    joint = generalise(cover_joint([part for part in together if len(part.sources) > 1]), universe, place)
    single = generalise(cover([*(part for part in together if len(part.sources) == 1), *left_out]), universe, place)
    return (*first, *sorted(joint, key=_precedence), *sorted(single, key=_precedence))


def _precedence(rule: RenameRule) -> tuple[int, int, str]:
    pattern = rule.sources[0].items[0]
    return -pattern.depth, -rule.n_keys, str(pattern)


def _differing(rules: Iterable[RenameRule], matches: Sequence[Match], source_keys: Sequence[str]) -> set[str]:
    """Source keys of which the rules make something else than the mapping does."""
    wanted = {match.target: (match.sources, match.transform) for match in matches}
    made = {match.target: (match.sources, match.transform) for match in apply_rules(rules, source_keys)}
    differing = [target for target in {**wanted, **made} if wanted.get(target) != made.get(target)]
    return {key for target in differing for side in (wanted, made) if target in side for key in side[target][0]}


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
