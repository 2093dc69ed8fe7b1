"""The result of matching: which checkpoint tensors feed which model key, how sure that is, what is open."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from automatch.errors import MappingError
from automatch.specs import StateSpec
from automatch.transforms import Copy, Transform

if TYPE_CHECKING:
    import torch

    from automatch.conversion import Conversion, Progress
    from automatch.rules import RenameRule
    from automatch.verify import Verification

CONFIDENT = 0.95
VerdictKind = Literal["same", "renamed", "resized", "partial", "different", "unknown"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The signals behind one match, each in [0, 1]; None where it was not measured (never 0)."""

    name: float | None = None
    shape: float | None = None
    size: float | None = None
    order: float | None = None
    context: float | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """A runner-up of a match, with its calibrated probability."""

    sources: tuple[str, ...]
    transform: Transform
    confidence: float


@dataclass(frozen=True, slots=True)
class Match:
    """What feeds one model key.

    Args:
        target: the model key.
        sources: checkpoint keys, in the order in which `transform` takes them.
        transform: how the sources become the target.
        score: raw score of the pair; comparable within one mapping only.
        confidence: calibrated probability in [0, 1] that sources and transform are right.
        evidence: the signals behind the score.
        alternatives: the runners-up, best first.
        decided: a person fixed this match (a pin, an answer, a review).
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform = field(default_factory=Copy)
    score: float = 0.0
    confidence: float = 0.0
    evidence: Evidence = field(default_factory=Evidence)
    alternatives: tuple[Alternative, ...] = ()
    decided: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """One answer to a question: what feeds each of the question's keys if it is taken."""

    label: str
    matches: tuple[Match, ...]
    confidence: float = 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """One decision that settles many keys.

    Args:
        id: stable within the mapping, e.g. ``"q1"``.
        text: the question as a person reads it, with the number of keys that hang on it.
        options: the possible answers, most probable first.
        keys: the model keys that an answer settles.
    """

    id: str
    text: str
    options: tuple[Option, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the whole mapping says about checkpoint and model.

    Args:
        kind: "same" (keys agree), "renamed", "resized" (same architecture, other head or size),
            "partial" (a shared part), "different" (another architecture), "unknown" (not a checkpoint of this kind).
        text: one sentence for a person.
        causes: the causes found, e.g. "wrapper prefix 'module.'".
    """

    kind: VerdictKind
    text: str
    causes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a mapping: where it came from, and what it held."""

    origin: str
    fingerprint: str
    n_keys: int
    spec: StateSpec | None = None

    @classmethod
    def of(cls, spec: StateSpec) -> Side:
        """The side that a spec describes."""
        return cls(spec.origin, spec.fingerprint, len(spec), spec)


@dataclass(frozen=True)
class KeyMapping:
    """Which checkpoint tensors feed which model key. Immutable: every change returns a new mapping.

    Args:
        source: the checkpoint.
        target: the model.
        matches: one per model key that is fed, in the model's order.
        missing_keys: keys of the model that nothing feeds.
        unexpected_keys: keys of the checkpoint that feed nothing.
        questions: the decisions a person should take.
        warnings: what a person should know before loading.
        verdict: what the whole says, or None for a mapping written by hand.
    """

    source: Side
    target: Side
    matches: tuple[Match, ...]
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    warnings: tuple[str, ...] = ()
    verdict: Verdict | None = None

    @cached_property
    def _by_target(self) -> dict[str, Match]:
        return {match.target: match for match in self.matches}

    def __len__(self) -> int:
        return len(self.matches)

    def __contains__(self, target: object) -> bool:
        return target in self._by_target

    def __getitem__(self, target: str) -> Match:
        """The match that feeds model key ``target``."""
        return self._by_target[target]

    def get(self, target: str) -> Match | None:
        """The match that feeds model key ``target``, or None."""
        return self._by_target.get(target)

    def __repr__(self) -> str:
        sure = sum(match.confidence >= CONFIDENT for match in self.matches)
        verdict = f", {self.verdict.kind}" if self.verdict else ""
        return (
            f"KeyMapping({len(self.matches)} of {self.target.n_keys} model keys fed, {sure} confident, "
            f"{len(self.questions)} questions, {len(self.missing_keys)} missing, {len(self.unexpected_keys)} unexpected{verdict})"
        )

    # ---- narrowing and deciding -------------------------------------------------------------------

    def confident(self, threshold: float = CONFIDENT) -> KeyMapping:
        """A smaller mapping: only matches with ``confidence >= threshold`` (in [0, 1])."""
        if not 0.0 <= threshold <= 1.0:
            raise MappingError(f"threshold must lie in [0, 1], got {threshold!r}")
        return self.with_matches(match for match in self.matches if match.decided or match.confidence >= threshold)

    def with_matches(self, matches: Iterable[Match], *, questions: Sequence[Question] | None = None) -> KeyMapping:
        """The same mapping with other matches; missing and unexpected keys follow (both sides' specs are needed)."""
        kept = {match.target: match for match in matches}
        used = {key for match in kept.values() for key in match.sources}
        targets = self.target.spec.keys if self.target.spec else (*self._by_target, *self.missing_keys)
        fed = {key for match in self.matches for key in match.sources}
        sources = self.source.spec.keys if self.source.spec else (*dict.fromkeys((*fed, *self.unexpected_keys)),)
        return replace(
            self,
            matches=tuple(kept[key] for key in targets if key in kept),
            missing_keys=tuple(key for key in targets if key not in kept),
            unexpected_keys=tuple(key for key in sources if key not in used),
            questions=self.questions if questions is None else tuple(questions),
        )

    def answer(self, question: str | Question, option: int | str) -> KeyMapping:
        """Settle a question (its id, or itself) with one of its options (its position or label).

        Raises:
            MappingError: there is no such question or option; the message lists those there are.
        """
        wanted = question.id if isinstance(question, Question) else question
        found = next((q for q in self.questions if q.id == wanted), None)
        if found is None:
            raise MappingError(f"no question {wanted!r}; open are: {', '.join(q.id for q in self.questions) or 'none'}")
        labels = [o.label for o in found.options]
        if isinstance(option, str) and option in labels:
            option = labels.index(option)
        if not isinstance(option, int) or not 0 <= option < len(labels):
            listed = ", ".join(f"{i} ({label})" for i, label in enumerate(labels))
            raise MappingError(f"question {wanted!r} has no option {option!r}; options are: {listed}")
        settled = {m.target: replace(m, confidence=1.0, decided=True) for m in found.options[option].matches}
        kept = [match for match in self.matches if match.target not in found.keys]
        rest = [q for q in self.questions if q.id != wanted]
        return self.with_matches([*kept, *settled.values()], questions=rest)

    def decide(self, target: str, sources: Sequence[str] | str | None, transform: Transform | None = None) -> KeyMapping:
        """Fix what feeds ``target``: source keys, or None for nothing (a reject).

        Raises:
            MappingError: the target or a source key does not exist on its side.
        """
        names = (sources,) if isinstance(sources, str) else tuple(sources or ())
        for name, side, key in [("model", self.target, target), *(("checkpoint", self.source, key) for key in names)]:
            if side.spec is not None and key not in side.spec:
                raise MappingError(f"{key!r} is not a key of the {name} ({side.origin})")
        kept = [match for match in self.matches if match.target != target]
        if sources is not None:
            kept.append(Match(target, names, transform or Copy(), confidence=1.0, decided=True))
        return self.with_matches(kept)

    # ---- what it means ------------------------------------------------------------------------------

    @cached_property
    def rules(self) -> tuple[RenameRule, ...]:
        """The few rename rules that reproduce this mapping exactly."""
        from automatch.rules import infer_rules

        return infer_rules(self)

    def report(self, *, all_keys: bool = False, width: int = 80) -> str:
        """The review as plain text, ``width`` columns wide; every key with ``all_keys``."""
        from automatch.report.terminal import render_text

        return render_text(self, all_keys=all_keys, width=width)

    def to_html(self, path: str | Path) -> Path:
        """Write the review as one self-contained HTML file and return its path."""
        from automatch.report.html import write_html

        return write_html(self, path)

    def export(self, kind: str, path: str | Path | None = None) -> str:
        """The mapping as code for other tools, independent of automatch; also written to ``path`` if given.

        Args:
            kind: "script" (`convert_checkpoint_keys`), "revise_keys" (mmengine), "key_mapping" or "weight_conversions"
                (transformers), "pre_hook" (`load_state_dict`) or "on_load_checkpoint" (Lightning).
            path: where to write it, too.

        Raises:
            MappingError: there is no such kind, or it cannot say what this mapping says.
        """
        from automatch.export import export_mapping
        from automatch.files import write_atomically

        text = export_mapping(self, kind)
        if path is not None:
            write_atomically(Path(path), text.encode())
        return text

    def _repr_html_(self) -> str:
        from automatch.report.notebook import render_notebook

        return render_notebook(self)

    def apply(self, ckpt: Any) -> dict[str, torch.Tensor]:
        """Compute the model's state_dict from the checkpoint this mapping was made for."""
        from automatch.apply import apply_mapping

        return apply_mapping(self, ckpt)

    def convert(
        self, ckpt: Any, out: str | Path, *, verify: bool = False, progress: Progress | None = None, trust: bool = False
    ) -> Conversion:
        """Write the checkpoint under the model's keys to ``out``, tensor by tensor; see `automatch.convert.convert_checkpoint`."""
        from automatch.convert import convert_checkpoint

        return convert_checkpoint(self, ckpt, out, verify=verify, progress=progress, trust=trust)

    def verify(
        self, model: torch.nn.Module, ckpt: Any, *, golden: Any = None, score: Any = None, budget: int = 64, trust: bool = False
    ) -> Verification:
        """Prove this mapping by running a copy of ``model`` on a golden batch; see `automatch.verify.verify`."""
        from automatch.verify import verify

        return verify(self, model, ckpt, golden=golden, score=score, budget=budget, trust=trust)

    # ---- JSON -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, version 1 (``automatch/mapping.schema.json``)."""
        from automatch.mapping_json import mapping_to_dict

        return mapping_to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeyMapping:
        """Read the JSON form.

        Raises:
            MappingError: it is not a mapping of a known version, or a field is missing or malformed.
        """
        from automatch.mapping_json import mapping_from_dict

        return mapping_from_dict(data)

    def save(self, path: str | Path) -> Path:
        """Write the JSON form to ``path`` (UTF-8) and return it."""
        from automatch.files import write_atomically

        text = json.dumps(self.to_dict(), ensure_ascii=True, separators=(",", ":"))
        return write_atomically(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> KeyMapping:
        """Read a mapping that `save` (or another tool) wrote.

        Raises:
            MappingError: the file is missing, or not a mapping.
        """
        try:
            data = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise MappingError(f"cannot read mapping {str(path)!r}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise MappingError(f"{str(path)!r} is not JSON: {error}") from error
        return cls.from_dict(data)
