"""`verify`: run a copy of the model on a golden batch, and settle open questions by what comes out."""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from automatch.apply import convert, open_source
from automatch.errors import MappingError, ModelError
from automatch.golden import TOLERANCE, Golden, run, traced
from automatch.mapping import KeyMapping, Option, Question
from automatch.rotary import ROTARY, rotary_questions
from automatch.snapshot import read_snapshot
from automatch.specs import spec_of_model
from automatch.training import complete_state

if TYPE_CHECKING:
    from torch import nn

Score = Callable[[Any], float]
_TIE = 1e-9


@dataclass(frozen=True)
class Verification:
    """What running the model has shown.

    Args:
        proven: True if the output is the golden one, False if it is not, whatever the answers to open questions, None if
            that cannot be told.
        text: one sentence for a person.
        mapping: the mapping, with the questions settled that the batch could settle.
        error: largest difference from the golden output, relative to its size (nan with a score).
        tried: how many answers were loaded and judged, at most the budget.
        first_difference: the first module whose output differs, or None.
    """

    proven: bool | None
    text: str
    mapping: KeyMapping
    error: float
    tried: int
    first_difference: str | None = None

    def __bool__(self) -> bool:
        return self.proven is True


def verify(
    mapping: KeyMapping,
    model: nn.Module,
    ckpt: Any,
    *,
    golden: Golden | tuple[Any, Any] | None = None,
    score: Score | None = None,
    budget: int = 64,
    trust: bool = False,
) -> Verification:
    """Load into a copy of ``model``, run it, and compare; the model itself is not touched.

    Open questions are answered by trying their options, the most probable first; so are the row orders of rotary
    query and key weights, if the output is wrong without them.

    Args:
        mapping: what is to be proven; every match counts, whatever its confidence.
        model: the model, with values (not on the meta device).
        ckpt: the checkpoint.
        golden: a golden batch, or ``(sample, output)``; without it the one in the checkpoint's snapshot is used.
        score: judges a loaded model instead (more is better), e.g. its accuracy on a validation set.
        budget: most loads to try, at least 1.
        trust: allow a pickle to execute code while it is read.

    Raises:
        MappingError: there is neither a golden batch nor a score, or the mapping is for another model or checkpoint.
        ModelError: the model has no values, or fails on the batch.
    """
    if budget < 1:
        raise MappingError(f"budget must be at least 1, got {budget}")
    batch = None if score is not None else _golden_of(golden, ckpt, trust)
    trial = _Trial(mapping, model, ckpt, trust, batch, score)
    try:
        return trial.settle_by_score(budget) if score is not None else trial.settle_by_golden(budget)
    finally:
        trial.close()


def _golden_of(golden: Golden | tuple[Any, Any] | None, ckpt: Any, trust: bool) -> Golden:
    if isinstance(golden, Golden):
        return golden
    if golden is not None:
        from automatch.packing import leaves

        return Golden(golden[0], tuple(leaves(golden[1])))
    snapshot = read_snapshot(ckpt, trust=trust)
    if snapshot is None or snapshot.golden is None:
        raise MappingError("the checkpoint holds no golden batch; pass golden=(sample, output) or score=function of the loaded model")
    return snapshot.golden


class _Trial:
    """A copy of the model, loaded again and again with other answers."""

    def __init__(self, mapping: KeyMapping, model: nn.Module, ckpt: Any, trust: bool, golden: Golden | None, score: Score | None) -> None:
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise ModelError("the model is on the meta device and cannot be run; build it on a device with memory")
        self.mapping, self.golden, self.score = mapping, golden, score
        self.model = copy.deepcopy(model)
        self.initial = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.target = spec_of_model(model)
        self.tried = 0
        self._source = open_source(mapping, ckpt, trust=trust)
        self.checkpoint = self._source.__enter__()

    def close(self) -> None:
        """Close the checkpoint."""
        self._source.__exit__(None, None, None)

    def put(self, mapping: KeyMapping) -> None:
        """Load the copy with what ``mapping`` says, on top of its initial values."""
        from automatch.atomic import replace_values

        state = dict(convert(mapping.matches, self.checkpoint, self.target, self.initial))
        replace_values(self.model, complete_state(state, self.target, self.initial))

    def error(self, mapping: KeyMapping) -> float:
        """How far the output is from the golden one."""
        assert self.golden is not None
        self.tried += 1
        self.put(mapping)
        return self.golden.error(run(self.model, self.golden.sample))

    def settle_by_golden(self, budget: int) -> Verification:
        """Try the answers until the golden output comes out."""
        best, best_error = self.mapping, math.inf
        for questions in (self.mapping.questions, rotary_questions(self.mapping)):
            if questions is not self.mapping.questions and not questions:
                continue
            for option_numbers, answered in _answers(best, questions):
                if self.tried >= budget:
                    return self._wrong(best, best_error, cut=True)
                error = self.error(answered)
                if error <= TOLERANCE:
                    return self._proven(answered, error, questions, option_numbers, budget)
                if error < best_error and questions is self.mapping.questions:
                    best, best_error = answered, error
        return self._wrong(best, best_error)

    def _proven(
        self, right: KeyMapping, error: float, questions: tuple[Question, ...], options: tuple[int, ...], budget: int
    ) -> Verification:
        """The output is right; but a question that has another answer with the same output stays open, or one that was not tried."""
        undecided: list[Question] = []
        untried: list[Question] = []
        for question, taken in zip(questions, options, strict=True):
            others = [option for number, option in enumerate(question.options) if number != taken and question.id != ROTARY]
            left = budget - self.tried
            if any(self.error(_answer(right, question, option)) <= TOLERANCE for option in others[:left]):
                undecided.append(question)
            elif len(others) > left:
                untried.append(question)
        self.put(right)
        if not self._is_sensitive():
            text = "the golden output does not depend on the weights; the batch cannot tell"
            return Verification(None, text, self.mapping, error, self.tried)
        if undecided or untried:
            keys = {key for question in (*undecided, *untried) for key in question.keys}
            asked = [match for match in self.mapping.matches if match.target in keys]
            open_questions = [question for question in questions if question in undecided or question in untried]
            still_open = right.with_matches([*(m for m in right.matches if m.target not in keys), *asked], questions=open_questions)
            return Verification(None, _open_text(undecided, untried, budget), still_open, error, self.tried)
        text = f"proven: the output is the golden one (largest difference {error:.1e} of its size, {self.tried} loads tried)"
        return Verification(True, text, right, error, self.tried)

    def _is_sensitive(self) -> bool:
        """Whether other weights give another output."""
        import torch

        assert self.golden is not None
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(-1.5).add_(0.01)
        return self.golden.error(run(self.model, self.golden.sample)) > TOLERANCE

    def _wrong(self, best: KeyMapping, error: float, cut: bool = False) -> Verification:
        first = self._first_difference(best)
        place = f"; the first module that differs is {first!r}" if first else ""
        told = f"(largest difference {error:.1e} of its size, {self.tried} loads tried){place}"
        if cut:
            text = f"not settled: no answer tried gives the golden output {told}; there are more, raise the budget"
            return Verification(None, text, self.mapping, error, self.tried, first)
        return Verification(False, f"wrong: the output is not the golden one {told}", self.mapping, error, self.tried, first)

    def _first_difference(self, mapping: KeyMapping) -> str | None:
        """The first module, in the order of calls, that gives another output than the old module it was loaded from."""
        assert self.golden is not None
        golden = dict(self.golden.trace)
        if not golden:
            return None
        trace: list[tuple[str, tuple[float, float, float]]] = []
        self.put(mapping)
        with traced(self.model, trace):
            run(self.model, self.golden.sample)
        old_paths = _module_pairs(mapping)
        for path, figures in trace:
            expected = golden.get(old_paths.get(path, ""))
            if expected is not None and not _alike(figures, expected):
                return path
        return None

    def settle_by_score(self, budget: int) -> Verification:
        """Answer the questions one after the other, each by the best score."""
        assert self.score is not None
        current, undecided = self.mapping, 0
        for question in self.mapping.questions:
            scores: list[tuple[float, KeyMapping]] = []
            for number in range(len(question.options)):
                if self.tried >= budget:
                    break
                answered = current.answer(question, number)
                scores.append((self._scored(answered), answered))
            scores.sort(key=lambda item: -item[0])
            if len(scores) < len(question.options) or _is_tie([score for score, _ in scores]):
                undecided += 1
            else:
                current = scores[0][1]
        settled = len(self.mapping.questions) - undecided
        text = f"{settled} of {len(self.mapping.questions)} questions answered by the score, {self.tried} loads tried"
        return Verification(None, text, current, math.nan, self.tried)

    def _scored(self, mapping: KeyMapping) -> float:
        import torch

        assert self.score is not None
        self.tried += 1
        self.put(mapping)
        self.model.eval()
        with torch.no_grad():
            score = float(self.score(self.model))
        return -math.inf if math.isnan(score) else score


def _open_text(undecided: list[Question], untried: list[Question], budget: int) -> str:
    text = "the output is the golden one"
    if undecided:
        text += f", but whatever the answer to {', '.join(question.id for question in undecided)}; the batch cannot tell"
    if untried:
        text += f"; other answers to {', '.join(question.id for question in untried)} were not tried within the budget of {budget}"
    return text


def _is_tie(scores: list[float]) -> bool:
    """Whether the best of falling scores is no better than the next, or no score at all."""
    return scores[0] == -math.inf or (len(scores) > 1 and scores[0] - scores[1] <= _TIE)


def _answers(mapping: KeyMapping, questions: tuple[Question, ...]) -> Iterator[tuple[tuple[int, ...], KeyMapping]]:
    """Every combination of answers, as option numbers and as a mapping; the most probable first."""
    costs = [sorted((-math.log(max(o.confidence, 1e-6)), i) for i, o in enumerate(q.options)) for q in questions]
    first: tuple[int, ...] = tuple(0 for _ in questions)
    queue: list[tuple[float, tuple[int, ...]]] = [(sum(options[0][0] for options in costs), first)]
    seen = {first}
    while queue:
        _, ranks = heapq.heappop(queue)
        taken = tuple(options[rank][1] for rank, options in zip(ranks, costs, strict=True))
        answered = mapping
        for question, number in zip(questions, taken, strict=True):
            answered = _answer(answered, question, question.options[number])
        yield taken, answered
        for at in range(len(ranks)):
            following = (*ranks[:at], ranks[at] + 1, *ranks[at + 1 :])
            if following[at] < len(costs[at]) and following not in seen:
                seen.add(following)
                heapq.heappush(queue, (sum(options[rank][0] for options, rank in zip(costs, following, strict=True)), following))


def _answer(mapping: KeyMapping, question: Question, option: Option) -> KeyMapping:
    settled = [replace(match, confidence=1.0, decided=True) for match in option.matches]
    kept = [match for match in mapping.matches if match.target not in question.keys]
    return mapping.with_matches([*kept, *settled], questions=[q for q in mapping.questions if q.id != question.id])


def _module_pairs(mapping: KeyMapping) -> dict[str, str]:
    """For each module of the model the checkpoint's module that feeds it, where that is one."""
    pairs: dict[str, set[str]] = {}
    for match in mapping.matches:
        pairs.setdefault(match.target.rpartition(".")[0], set()).update(key.rpartition(".")[0] for key in match.sources)
    return {new: next(iter(old)) for new, old in pairs.items() if len(old) == 1}


def _alike(figures: tuple[float, float, float], golden: tuple[float, float, float]) -> bool:
    size = max(abs(golden[1]), 1e-12)
    return figures[2] == golden[2] and all(abs(a - b) <= 10 * TOLERANCE * size for a, b in zip(figures[:2], golden[:2], strict=True))
