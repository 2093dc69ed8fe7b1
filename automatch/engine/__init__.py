"""The matching itself: two specs in, matches with calibrated confidence and questions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from automatch.engine.confidence import judge
from automatch.engine.fused import fused_question
from automatch.engine.identity import same_but_for_prefix
from automatch.engine.layout import layout
from automatch.engine.pipeline import run_stages
from automatch.engine.questions import find_questions
from automatch.engine.rotary import rotary_question
from automatch.engine.solve import Weights
from automatch.engine.tables import current
from automatch.engine.verdict import shift_warnings, verdict_of
from automatch.errors import MappingError
from automatch.keys import template_of
from automatch.mapping import CONFIDENT, Match, Question, Verdict
from automatch.specs import StateSpec
from automatch.transforms import Concat, Copy, Transform

LIKE_A_PIN = 0.97  # a person decided the same template elsewhere

Pins = Mapping[str, str | Sequence[str] | None]


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What the engine found."""

    matches: tuple[Match, ...]
    questions: tuple[Question, ...]
    warnings: tuple[str, ...]
    verdict: Verdict


def match_specs(source: StateSpec, target: StateSpec, pins: Pins, *, exhaustive: bool = False) -> EngineResult:
    """Match two specs around what a person has pinned.

    Args:
        source: the checkpoint.
        target: the model.
        pins: decided pairs; their keys take no part in matching.
        exhaustive: solve every repetition instead of a few of each; slower, same answer.

    Raises:
        MappingError: a pin names a key that does not exist, or a source that cannot have the target's shape.
    """
    pinned = [_pinned(source, target, key, value) for key, value in pins.items()]
    used = {key for match in pinned if match is not None for key in match.sources}
    plain = None if pins else same_but_for_prefix(source, target)
    if plain is not None:
        matches, rotary, warning = rotary_question(source, target, plain, 1)
        return EngineResult(tuple(matches), (rotary,) if rotary else (), (warning,) if warning else (), verdict_of(source, target, matches))
    tables = current()
    agreed = {template_of(m.target): template_of(m.sources[0]) for m in pinned if m is not None and len(m.sources) == 1}
    outcome = run_stages(
        source,
        target,
        tables,
        Weights(),
        without_sources=sorted(used),
        without_targets=sorted(pins),
        agreed=agreed,
        exhaustive=exhaustive,
    )
    judged = judge(outcome, tables.confidence)
    questions = find_questions(outcome, judged)
    taken = {match.target: match for question in questions for match in question.options[0].matches}
    proposed = [_confirmed(taken.get(match.target, match), agreed) for match in judged.matches]
    questions = tuple(q for q in questions if not any(template_of(key) in agreed for key in q.keys))
    proposed, fused, reordered = fused_question(source, proposed, len(questions) + 1)
    if fused is not None:
        settled = set(fused.keys)
        questions = (*(question for question in questions if not settled & set(question.keys)), fused)
    proposed, rotary, warning = rotary_question(source, target, proposed, len(questions) + 1)
    matches = (*(match for match in pinned if match is not None), *proposed)
    if rotary is not None:
        settled = set(rotary.keys)
        questions = (rotary, *(question for question in questions if not settled & set(question.keys)))
    warnings = shift_warnings(source, [match for match in judged.matches if match.confidence >= 0.5])
    warnings[:0] = [text for text in (warning, reordered) if text]
    verdict = verdict_of(source, target, matches)
    if verdict.kind == "different":
        matches, questions = tuple(m for m in matches if m.decided or m.confidence >= CONFIDENT), ()
    return EngineResult(matches, questions, tuple(warnings), verdict)


def _confirmed(match: Match, agreed: Mapping[str, str]) -> Match:
    """A match of which a pin has decided the template is as good as decided."""
    follows = len(match.sources) == 1 and agreed.get(template_of(match.target)) == template_of(match.sources[0])
    return replace(match, confidence=max(match.confidence, LIKE_A_PIN)) if follows else match


def _pinned(source: StateSpec, target: StateSpec, key: str, value: str | Sequence[str] | None) -> Match | None:
    if key not in target:
        raise MappingError(f"pin {key!r}: the model ({target.origin}) has no such key")
    if value is None:
        return None
    keys = (value,) if isinstance(value, str) else tuple(value)
    for name in keys:
        if name not in source:
            raise MappingError(f"pin {key!r}: the checkpoint ({source.origin}) has no key {name!r}")
    return Match(key, keys, _pinned_transform(source, target, key, keys), confidence=1.0, decided=True)


def _pinned_transform(source: StateSpec, target: StateSpec, key: str, keys: tuple[str, ...]) -> Transform:
    wanted = target[key].shape
    if len(keys) == 1:
        between = layout(source[keys[0]].shape, wanted)
        if between is not None:
            return between
    shapes = [source[name].shape for name in keys]
    for dim in range(len(wanted)):
        rest = {shape[:dim] + shape[dim + 1 :] for shape in shapes if len(shape) == len(wanted)}
        if rest == {wanted[:dim] + wanted[dim + 1 :]} and sum(shape[dim] for shape in shapes) == wanted[dim]:
            return Copy() if len(keys) == 1 else Concat(dim)
    raise MappingError(
        f"pin {key!r}: model {wanted}, checkpoint {shapes}; no reshape, permutation or concatenation leads from one to the other"
    )
