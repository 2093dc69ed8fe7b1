"""Few decisions that settle many keys: columns that could be exchanged, and nothing tells which way."""

from __future__ import annotations

from automatch.engine.confidence import Judged
from automatch.engine.pipeline import Outcome
from automatch.mapping import Question


def find_questions(outcome: Outcome, judged: Judged) -> tuple[Question, ...]:
    """The open questions, those on which most keys hang first."""
    return ()
