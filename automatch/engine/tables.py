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
        roots: the node at which each tree starts.
        feature, threshold: of each node of all trees, what is compared, and with what.
        below: the two nodes that follow where the feature is above the threshold and where it is not; a leaf follows itself.
        value: log odds that each leaf adds.
        note: what it was fitted on.
    """

    base: float
    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    below: np.ndarray
    value: np.ndarray
    note: str = ""

    def probability(self, rows: np.ndarray) -> np.ndarray:
        """The probability in [0, 1] of each row of features."""
        every = np.arange(len(rows))[:, None]
        at = np.broadcast_to(self.roots, (len(rows), len(self.roots)))
        while True:
            low = rows[every, self.feature[at]] <= self.threshold[at]
            following = self.below[low.astype(np.intp), at]
            if np.array_equal(following, at):
                return 1.0 / (1.0 + np.exp(-(self.base + self.value[at].sum(1))))
            at = following


NO_TREES = Trees(0.0, np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0), np.zeros((2, 0), np.intp), np.zeros(0))


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
    trees = data["trees"]
    sizes = [len(tree["feature"]) for tree in trees]
    starts = np.cumsum([0, *sizes])[:-1]
    feature, threshold, value = (np.concatenate([np.array(tree[name]) for tree in trees]) for name in ("feature", "threshold", "value"))
    below = np.stack(
        [np.concatenate([np.array(tree[way]) + start for tree, start in zip(trees, starts, strict=True)]) for way in ("right", "left")]
    )
    below = np.where(feature < 0, np.arange(len(feature)), below)
    return Trees(float(data["base"]), starts, np.maximum(feature, 0), threshold, below, value, data.get("note", ""))


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
