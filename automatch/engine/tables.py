"""The learnt tables: word lexicon, order of registration and confidence model, read from data files fitted by ``benchmarks/fit.py``."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from automatch.engine.names import Lexicon
from automatch.engine.registration import Precedence, read_precedence


@dataclass(frozen=True, slots=True)
class Trees:
    """Additive shallow trees over the features of `automatch.engine.features`; log odds of being right.

    Args:
        base: log odds before any tree.
        nodes: per tree, arrays of feature (-1 for a leaf), threshold, left, right and value.
        note: what it was fitted on.
    """

    base: float
    nodes: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]
    note: str = ""

    def probability(self, rows: np.ndarray) -> np.ndarray:
        """The probability in [0, 1] of each row of features."""
        total = np.full(len(rows), self.base)
        every = np.arange(len(rows))
        for feature, threshold, left, right, value in self.nodes:
            at = np.zeros(len(rows), dtype=np.intp)
            while True:
                inner = feature[at] >= 0
                if not inner.any():
                    break
                go_left = rows[every, np.maximum(feature[at], 0)] <= threshold[at]
                at = np.where(inner, np.where(go_left, left[at], right[at]), at)
            total += value[at]
        return 1.0 / (1.0 + np.exp(-total))


@dataclass(frozen=True, slots=True)
class Tables:
    """What the engine has learnt."""

    lexicon: Lexicon
    confidence: Trees
    precedence: Precedence


_override: ContextVar[Tables | None] = ContextVar("automatch_tables", default=None)


def read_lexicon(data: Mapping[str, Any]) -> Lexicon:
    """The look-up of word pairs, both ways, from the table's JSON form ``[[word, word, similarity, count], ...]``."""
    lexicon: dict[str, dict[str, float]] = {}
    for a, b, similarity, _ in data["pairs"]:
        lexicon.setdefault(a, {})[b] = similarity
        lexicon.setdefault(b, {})[a] = similarity
    return lexicon


def read_trees(data: Mapping[str, Any]) -> Trees:
    """The confidence model from its JSON form."""
    nodes = tuple(
        (
            np.array(tree["feature"], dtype=np.intp),
            np.array(tree["threshold"], dtype=np.float64),
            np.array(tree["left"], dtype=np.intp),
            np.array(tree["right"], dtype=np.intp),
            np.array(tree["value"], dtype=np.float64),
        )
        for tree in data["trees"]
    )
    return Trees(float(data["base"]), nodes, data.get("note", ""))


@lru_cache(maxsize=1)
def _shipped() -> Tables:
    folder = files("automatch.engine").joinpath("data")
    return Tables(
        read_lexicon(json.loads(folder.joinpath("lexicon.json").read_text())),
        read_trees(json.loads(folder.joinpath("confidence.json").read_text())),
        read_precedence(json.loads(folder.joinpath("order.json").read_text())),
    )


def current() -> Tables:
    """The tables in force: the shipped ones, or those of an enclosing `use`."""
    return _override.get() or _shipped()


@contextmanager
def use(tables: Tables) -> Generator[None, None, None]:
    """Match with other tables inside a ``with`` block (for benchmarks that leave families out of the fitting)."""
    token = _override.set(tables)
    try:
        yield
    finally:
        _override.reset(token)
