"""The one view object behind every report: rows, words and rounding, with nothing left to compute."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Literal

from automatch.mapping import CONFIDENT, KeyMapping, Match, Question, Side
from automatch.report.collapse import collapse
from automatch.report.groups import Group, group_by_rule, narrowed
from automatch.report.leftovers import Leftover, missing_leftovers, unexpected_leftovers
from automatch.report.wording import count, invents_values, percent, shape_text, short, transform_text

Band = Literal["decided", "sure", "uncertain", "weak"]
DOUBTFUL = 0.5
MAX_TEXT = 1000
TITLES = {
    "same": "Same keys",
    "renamed": "Renamed",
    "resized": "Resized",
    "partial": "Partly shared",
    "different": "Different architecture",
    "unknown": "Not recognised",
}
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
_BINS = ((0.99, "99% and more"), (0.95, "95–99%"), (0.8, "80–95%"), (0.5, "50–80%"), (0.0, "below 50%"))


@dataclass(frozen=True, slots=True)
class Row:
    """One match as people see it; keys are as they are and go through `wording.short` when drawn.

    Args:
        target: the model key.
        sources: the checkpoint keys.
        shapes: source shapes and the target's, e.g. ``3 of 64×64 → 192×64``.
        transform: what happens to the sources, in words; empty for a copy.
        confidence: calibrated probability in [0, 1].
        band: how that reads: decided by a person, sure, uncertain or weak.
        withheld: not loaded unless a person decides.
    """

    target: str
    sources: tuple[str, ...]
    shapes: str
    transform: str
    confidence: float
    band: Band
    withheld: bool

    @property
    def confidence_text(self) -> str:
        """The confidence, rounded down."""
        return "decided" if self.band == "decided" else percent(self.confidence)


@dataclass(frozen=True, slots=True)
class OptionView:
    """One answer, its confidence (empty where nobody gave one), and the first of its pairs as an example."""

    label: str
    confidence: str
    example: str


@dataclass(frozen=True, slots=True)
class QuestionView:
    """One question, its keys collapsed."""

    id: str
    text: str
    n_keys: int
    keys: tuple[str, ...]
    options: tuple[OptionView, ...]


@dataclass(frozen=True, slots=True)
class WarningView:
    """A warning, and those that differ from it in keys and numbers alone."""

    text: str
    others: tuple[str, ...] = ()

    @property
    def more(self) -> str:
        """How many like it there are, in words; empty for none."""
        return f"and {len(self.others):,} more like it" if self.others else ""


@dataclass(frozen=True, slots=True)
class View:
    """Everything a report says.

    Args:
        title: the verdict in a word or two.
        headline: the verdict in a sentence.
        kind: the verdict's kind.
        causes: the causes found.
        source: the checkpoint's origin.
        target: the model's origin.
        n_target: keys of the model.
        rows: one per match, in the model's order.
        groups: the rules, each with the rows it explains.
        withheld: the pairs that are not loaded as they stand, by rule, least sure first.
        questions: the decisions to take.
        missing: keys of the model that nothing feeds.
        unexpected: keys of the checkpoint that feed nothing.
        bins: (label, number of matches) of the confidence histogram, surest first.
        warnings: what to know before loading, one line per kind.
        next_step: what to do now.
    """

    title: str
    headline: str
    kind: str
    causes: tuple[str, ...]
    source: str
    target: str
    n_target: int
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    withheld: tuple[Group, ...]
    questions: tuple[QuestionView, ...]
    missing: tuple[Leftover, ...]
    unexpected: tuple[Leftover, ...]
    bins: tuple[tuple[str, int], ...]
    warnings: tuple[WarningView, ...]
    next_step: str

    @property
    def n_sure(self) -> int:
        """Matches that are loaded as they stand."""
        return sum(not row.withheld for row in self.rows)

    @property
    def n_withheld(self) -> int:
        """Matches that are not loaded as they stand."""
        return len(self.rows) - self.n_sure

    @property
    def n_missing(self) -> int:
        """Keys of the model that nothing feeds."""
        return sum(len(left.keys) for left in self.missing)

    @property
    def n_missing_harmless(self) -> int:
        """Those of the missing keys that do no harm."""
        return sum(len(left.keys) for left in self.missing if left.harmless)

    @property
    def n_unexpected(self) -> int:
        """Keys of the checkpoint that feed nothing."""
        return sum(len(left.keys) for left in self.unexpected)

    @property
    def n_unexpected_harmless(self) -> int:
        """Those of the unexpected keys that do no harm."""
        return sum(len(left.keys) for left in self.unexpected if left.harmless)

    @property
    def fed_text(self) -> str:
        """How much of the model is fed."""
        return f"{len(self.rows):,} of {count(self.n_target, 'model key')} fed"

    @property
    def rules_text(self) -> str:
        """How many rules explain how many keys."""
        return f"{count(len(self.groups), 'rule')} {'explains' if len(self.groups) == 1 else 'explain'} {count(len(self.rows), 'key')}"

    @property
    def stats(self) -> tuple[tuple[str, int, str], ...]:
        """(band, number of keys, words) of the coverage bar, surest first."""
        harmful = self.n_missing - self.n_missing_harmless
        return (
            ("sure", self.n_sure, "confident"),
            ("withheld", self.n_withheld, "withheld"),
            ("missing", harmful, "missing"),
            ("harmless", self.n_missing_harmless, "missing but harmless"),
        )


def build_view(mapping: KeyMapping) -> View:
    """Everything a report says about ``mapping``."""
    verdict = mapping.verdict
    open_keys = {key for question in mapping.questions for key in question.keys}
    rows = tuple(_row(match, mapping, open_keys) for match in mapping.matches)
    groups = group_by_rule(mapping)
    missing, unexpected = missing_leftovers(mapping), unexpected_leftovers(mapping)
    kind = verdict.kind if verdict else "unknown"
    return View(
        title=TITLES[kind] if verdict else "Mapping",
        headline=short(verdict.text, MAX_TEXT) if verdict else f"{len(rows):,} of {count(mapping.target.n_keys, 'model key')} are fed.",
        kind=kind,
        causes=tuple(short(cause, MAX_TEXT) for cause in verdict.causes) if verdict else (),
        source=short(mapping.source.origin or "checkpoint", 160),
        target=short(mapping.target.origin or "model", 160),
        n_target=mapping.target.n_keys,
        rows=rows,
        groups=groups,
        withheld=narrowed(mapping, groups, {position for position, row in enumerate(rows) if row.withheld}),
        questions=tuple(_question(question) for question in mapping.questions),
        missing=missing,
        unexpected=unexpected,
        bins=_bins(rows),
        warnings=_warnings(mapping.warnings),
        next_step=_next_step(mapping, rows, missing),
    )


def is_withheld(match: Match, open_keys: Set[str] = frozenset()) -> bool:
    """Whether loading leaves a match out until a person decides; ``open_keys`` hang on an open question."""
    return not match.decided and (match.confidence < CONFIDENT or invents_values(match.transform) or match.target in open_keys)


def _band(match: Match, withheld: bool) -> Band:
    if match.decided:
        return "decided"
    if not withheld:
        return "sure"
    return "uncertain" if match.confidence >= DOUBTFUL else "weak"


def _row(match: Match, mapping: KeyMapping, open_keys: Set[str]) -> Row:
    withheld = is_withheld(match, open_keys)
    return Row(
        target=match.target,
        sources=match.sources,
        shapes=_shapes(match, mapping),
        transform=transform_text(match.transform),
        confidence=match.confidence,
        band=_band(match, withheld),
        withheld=withheld,
    )


def _shapes(match: Match, mapping: KeyMapping) -> str:
    after = _shape_of(mapping.target, match.target)
    if len(match.sources) == 1:
        before = _shape_of(mapping.source, match.sources[0])
        return after if before == after else f"{before} → {after}"
    befores = Counter(_shape_of(mapping.source, key) for key in match.sources)
    before = " + ".join(f"{n} of {text}" if n > 1 else text for text, n in befores.items())
    return f"{before} → {after}"


def _shape_of(side: Side, key: str) -> str:
    return shape_text(side.spec[key].shape if side.spec is not None and key in side.spec else None)


def _question(question: Question) -> QuestionView:
    options = tuple(
        OptionView(
            short(option.label, MAX_TEXT),
            percent(option.confidence) if option.confidence else "",
            _example(option.matches[0]) if option.matches else "feeds nothing",
        )
        for option in question.options
    )
    keys = tuple(group.template for group in collapse(question.keys))
    return QuestionView(short(question.id, 60), short(question.text, MAX_TEXT), len(question.keys), keys, options)


def _example(match: Match) -> str:
    words = transform_text(match.transform)
    return f"{' + '.join(short(key, 120) for key in match.sources)} → {short(match.target, 120)}{f' ({words})' if words else ''}"


def _warnings(warnings: Iterable[str]) -> tuple[WarningView, ...]:
    kinds: dict[str, list[str]] = {}
    for warning in warnings:
        kinds.setdefault(_VARYING.sub("#", warning), []).append(short(warning, MAX_TEXT))
    return tuple(WarningView(first, tuple(others)) for first, *others in kinds.values())


def _bins(rows: tuple[Row, ...]) -> tuple[tuple[str, int], ...]:
    found: Counter[str] = Counter()
    for row in rows:
        found[next(label for floor, label in _BINS if row.confidence >= floor)] += 1
    return tuple((label, found[label]) for _, label in _BINS)


def _next_step(mapping: KeyMapping, rows: tuple[Row, ...], missing: tuple[Leftover, ...]) -> str:
    if mapping.questions:
        return f"answer {count(len(mapping.questions), 'question')}, e.g. mapping = mapping.answer({mapping.questions[0].id!r}, 0)"
    withheld = sum(row.withheld for row in rows)
    if withheld:
        return f"review {count(withheld, 'withheld pair')}: mapping.to_html('report.html'), or mapping.decide(target, source)"
    if not rows:
        return "nothing fits: check that checkpoint and model belong together"
    lost = sum(len(left.keys) for left in missing if not left.harmless)
    if lost:
        return f"{count(lost, 'model key')} would keep initial values; if that is meant, load with strict=False"
    return "nothing is open: automatch.load(model, ckpt) loads it"
