"""Which commit's model class a checkpoint was saved from: every distinct old version is built and compared."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from automatch.errors import ModelError
from automatch.find_commit._git import Commit, Repository, Version
from automatch.find_commit._process import Worker
from automatch.readers import open_checkpoint

__all__ = ["Commit", "Fit", "Search", "find_commit"]

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
        error: why the version could not be built; empty where it was.
        seconds: how long it took.
    """

    commits: tuple[Commit, ...]
    score: float = 0.0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    prefix: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether keys and shapes are the same on both sides."""
        return not self.error and not (self.missing or self.unexpected or self.mismatched)


@dataclass(frozen=True, slots=True)
class Search:
    """What the search found.

    Args:
        best: the newest version that fits exactly, or else the closest; None where no version could be built.
        tried: every version that was tried, in order.
        n_commits: commits that were looked at.
        n_versions: distinct versions among them.
    """

    best: Fit | None
    tried: tuple[Fit, ...]
    n_commits: int
    n_versions: int


Progress = Callable[[int, int, Fit], None]


def find_commit(
    ckpt: Any,
    factory: str,
    repo: str | Path = ".",
    *,
    run_old_code: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    time_limit: float = 60.0,
    everywhere: bool = False,
    progress: Progress | None = None,
) -> Search:
    """Search the git history for the version of a model class that fits a checkpoint, newest first.

    The working tree is not touched: each version is written to a temporary folder and built in a process of its own, on
    the meta device where it can be.

    Args:
        ckpt: a path, an open checkpoint, a loaded dict, or a `StateSpec`.
        factory: ``package.module:factory`` or ``folder/file.py:Factory``, as it is named today.
        repo: a folder inside the repository.
        run_old_code: consent; building an old model runs the old code of this repository.
        kwargs: arguments of the factory.
        time_limit: seconds that one version may take.
        everywhere: search all branches and tags, not only what led to HEAD.
        progress: called after every version with how many are done, how many there are, and the last one.

    Raises:
        ModelError: no consent, no repository, or no such file in its history.
        CheckpointError: the checkpoint cannot be read.
    """
    if not run_old_code:
        raise ModelError("find_commit builds old versions of the model, which runs your own old code; pass run_old_code=True if you agree")
    with open_checkpoint(ckpt) as checkpoint:
        source = {tensor.key: tensor.shape for tensor in checkpoint.spec}
    repository = Repository(Path(repo))
    place, name = _file_of(factory, repository)
    commits = repository.commits(everywhere=everywhere)
    versions = repository.versions(commits, repository.former_paths(place))
    if all(version.path is None for version in versions):
        raise ModelError(
            f"no commit of {str(repository.root)!r} has a file {place!r}; name the factory as package.module:factory or file.py:Factory"
        )
    tried: list[Fit] = []
    with tempfile.TemporaryDirectory(prefix="automatch-") as folder, Worker(Path(folder)) as worker:
        for version in versions:
            tried.append(_try(version, repository, worker, (name, dict(kwargs or {}), time_limit), source))
            if progress is not None:
                progress(len(tried), len(versions), tried[-1])
            if tried[-1].exact:
                break
    built = [fit for fit in tried if not fit.error]
    best = max(built, key=lambda fit: fit.score, default=None)  # of equal ones the newest, which comes first
    return Search(best, tuple(tried), len(commits), len(versions))


def _file_of(factory: str, repository: Repository) -> tuple[str, str]:
    """The file that defines the factory, from the top of the repository, and the factory's name in it."""
    place, colon, name = factory.rpartition(":")
    if not colon or not place or not name:
        raise ModelError(f"no factory {factory!r}; name it as package.module:factory or folder/file.py:Factory")
    if place.endswith(".py"):
        return Path(place).as_posix(), name
    module = place.replace(".", "/")
    choices = [f"{start}{module}{end}" for start in ("", "src/") for end in (".py", "/__init__.py")]
    return next((choice for choice in choices if (repository.root / choice).exists()), choices[0]), name


def _try(version: Version, repository: Repository, worker: Worker, how: tuple[str, dict[str, Any], float], source: Shapes) -> Fit:
    start = time.monotonic()
    name, kwargs, limit = how
    if version.path is None:
        return Fit(version.commits, error="the file does not exist yet", unexpected=tuple(source))
    with tempfile.TemporaryDirectory(prefix="automatch-") as folder:
        repository.extract(version.commits[0], Path(folder))
        result = worker.build(Path(folder), version.path, name, kwargs, limit)
    seconds = time.monotonic() - start
    if "error" in result:
        return Fit(version.commits, error=result["error"], seconds=seconds)
    target = {str(key): tuple(int(size) for size in shape) for key, shape, _ in result["entries"]}
    fits = [_compare(version.commits, source, target, prefix, seconds) for prefix in _prefixes(tuple(source))]
    return max(fits, key=lambda fit: (fit.score, -len(fit.prefix)))


def _prefixes(keys: Sequence[str]) -> list[str]:
    """What all keys begin with, segment by segment: wrappers and the module that the model was part of."""
    prefixes = [""]
    while keys and all("." in key[len(prefixes[-1]) :] for key in keys):
        head = keys[0][: keys[0].index(".", len(prefixes[-1])) + 1]
        if not all(key.startswith(head) for key in keys):
            break
        prefixes.append(head)
    return prefixes


def _compare(commits: tuple[Commit, ...], source: Shapes, target: Shapes, prefix: str, seconds: float) -> Fit:
    own = {key[len(prefix) :]: shape for key, shape in source.items()}
    missing = tuple(key for key in target if key not in own)
    unexpected = tuple(key for key in own if key not in target)
    mismatched = tuple(key for key, shape in target.items() if key in own and own[key] != shape)
    shared = len(target) - len(missing) - len(mismatched)
    score = shared / max(1, len(own.keys() | target.keys()))
    return Fit(commits, score, missing, unexpected, mismatched, prefix, seconds=seconds)
