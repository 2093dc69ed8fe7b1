"""Which commit's model class a checkpoint was saved from: every distinct old version is built and compared."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from automatch.errors import ModelError
from automatch.find_commit._build import Builder
from automatch.find_commit._fit import Fit, Shapes, best_fit
from automatch.find_commit._git import Commit, Repository
from automatch.find_commit._process import Worker
from automatch.readers import open_checkpoint

__all__ = ["Commit", "Fit", "Search", "find_commit"]


@dataclass(frozen=True, slots=True)
class Search:
    """What the search found.

    Args:
        best: the newest version that fits exactly, or else the closest; None where no version could be built.
        tried: every distinct version that was tried, in order.
        n_commits: commits that were looked at.
        shallow: whether the clone lacks older commits, so that the right one may not be there.
    """

    best: Fit | None
    tried: tuple[Fit, ...]
    n_commits: int
    shallow: bool = False


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
    the meta device where it can be. Commits that agree in every file that building has read are one version.

    Args:
        ckpt: a path, an open checkpoint, a loaded dict, or a `StateSpec`.
        factory: ``package.module:factory`` or ``folder/file.py:Factory``, as it is named today.
        repo: a folder inside the repository; the factory is looked for below it, then below the top.
        run_old_code: consent; building an old model runs the old code of this repository.
        kwargs: arguments of the factory.
        time_limit: seconds that one version may take.
        everywhere: search all branches and tags, not only what led to HEAD.
        progress: called after every version with how many commits are done, how many there are, and the version.

    Raises:
        ModelError: no consent, no repository, or no such file in its history.
        CheckpointError: the checkpoint cannot be read.
    """
    if not run_old_code:
        raise ModelError("find_commit builds old versions of the model, which runs your own old code; pass run_old_code=True if you agree")
    with open_checkpoint(ckpt) as checkpoint:
        source = {tensor.key: tensor.shape for tensor in checkpoint.spec}
    with Repository(Path(repo)) as repository, tempfile.TemporaryDirectory(prefix="automatch-") as folder, Worker(Path(folder)) as worker:
        commits = repository.commits(everywhere=everywhere)
        builder = Builder(repository, worker, factory, commits, kwargs=kwargs or {}, time_limit=time_limit)
        tried = _walk(commits, builder, repository, source, progress)
        best = max((fit for fit in tried if not fit.error), key=lambda fit: fit.score, default=None)  # of equal ones the newest
        return Search(best, tuple(tried), len(commits), repository.shallow)


@dataclass(slots=True)
class _Version:
    """A version that was built, and the objects it rests on: commits that have the same ones are built alike."""

    fit: Fit
    objects: dict[str, str]

    def is_of(self, objects: Mapping[str, str]) -> bool:
        return all(objects[path] == found for path, found in self.objects.items())


def _walk(commits: Sequence[Commit], builder: Builder, repository: Repository, source: Shapes, progress: Progress | None) -> list[Fit]:
    """Build each distinct version once; after an exact fit only its other commits are looked for."""
    versions: list[_Version] = []
    exact: _Version | None = None
    for done, commit in enumerate(commits, 1):
        known = [exact] if exact else versions
        objects = repository.ids(commit, (path for version in known for path in version.objects))
        version = next((version for version in known if version.is_of(objects)), None)
        if version is not None:
            version.fit = replace(version.fit, commits=(*version.fit.commits, commit))
        elif exact is None:
            start = time.monotonic()
            built = builder.build(commit)
            fit = best_fit(built, source, commit, time.monotonic() - start)
            versions.append(_Version(fit, repository.ids(commit, (path for one in built for path in one.rests_on))))
            if progress is not None:
                progress(done, len(commits), fit)
            exact = versions[-1] if fit.exact else None
    return [version.fit for version in versions]
