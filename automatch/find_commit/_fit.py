"""How well one version of a model fits a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from automatch.find_commit._build import Built
from automatch.find_commit._git import Commit

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Fit:
    """One version of the model code, compared with the checkpoint.

    Args:
        commits: the commits that have this version, newest first.
        score: share of (key, shape) pairs that both sides have, in [0, 1]; 1 is an exact fit.
        missing: keys of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model lacks.
        mismatched: keys whose shapes differ.
        prefix: what had to be taken off the checkpoint's keys, e.g. ``"module."``.
        factory: what was built, as ``folder/file.py:Factory``; the file or the name may have been another one then.
        error: why the version could not be built; empty where it was.
        seconds: how long it took.
    """

    commits: tuple[Commit, ...]
    score: float = 0.0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    prefix: str = ""
    factory: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether keys and shapes are the same on both sides."""
        return not self.error and not (self.missing or self.unexpected or self.mismatched)


def best_fit(built: Iterable[Built], source: Shapes, commit: Commit, seconds: float) -> Fit:
    """The best of what was built of one commit, under the prefix with which it fits best."""
    fits: list[Fit] = []
    for one in built:
        if one.error:
            fits.append(Fit((commit,), factory=one.factory, error=one.error))
        else:
            fits += [replace(_compare(commit, source, one.shapes, prefix), factory=one.factory) for prefix in _prefixes(tuple(source))]
    return replace(max(fits, key=lambda fit: (not fit.error, fit.score, -len(fit.prefix))), seconds=seconds)


def _prefixes(keys: Sequence[str]) -> list[str]:
    """What all keys begin with, segment by segment: wrappers and the module that the model was part of."""
    prefixes = [""]
    while keys and all("." in key[len(prefixes[-1]) :] for key in keys):
        head = keys[0][: keys[0].index(".", len(prefixes[-1])) + 1]
        if not all(key.startswith(head) for key in keys):
            break
        prefixes.append(head)
    return prefixes


def _compare(commit: Commit, source: Shapes, target: Shapes, prefix: str) -> Fit:
    own = {key[len(prefix) :]: shape for key, shape in source.items()}
    missing = tuple(key for key in target if key not in own)
    unexpected = tuple(key for key in own if key not in target)
    mismatched = tuple(key for key, shape in target.items() if key in own and own[key] != shape)
    shared = len(target) - len(missing) - len(mismatched)
    return Fit((commit,), shared / max(1, len(own.keys() | target.keys())), missing, unexpected, mismatched, prefix)
