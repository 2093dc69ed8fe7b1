"""Building the model of one commit, wherever its factory was then and whatever it was called."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from automatch.errors import ModelError
from automatch.find_commit._git import Commit, Repository
from automatch.find_commit._process import Worker

_DEFINED = re.compile(r"^(?:class|def)[ \t]+(\w+)", re.MULTILINE)
_MOST = 5  # names and files that are tried in place of one that is gone


@dataclass(frozen=True, slots=True)
class Built:
    """What one attempt gave.

    Args:
        factory: what was tried, as ``folder/file.py:Factory``.
        shapes: the model's keys and shapes; empty where it could not be built.
        error: why it could not be built.
        rests_on: the files and folders of the commit that the outcome depends on, from the top of the repository.
        lacks_name: whether the file was read but does not define the factory.
    """

    factory: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    error: str = ""
    rests_on: frozenset[str] = frozenset()
    lacks_name: bool = False


class Builder:
    """Builds the factory of any commit.

    Args:
        repository: the repository.
        worker: the process that builds.
        factory: ``package.module:factory`` or ``folder/file.py:Factory``, as it is named today.
        commits: the commits that are searched.
        kwargs: arguments of the factory.
        time_limit: seconds that one attempt may take.

    Raises:
        ModelError: the factory is not named as it should be, or no commit has its file.
    """

    def __init__(
        self,
        repository: Repository,
        worker: Worker,
        factory: str,
        commits: Sequence[Commit],
        *,
        kwargs: Mapping[str, Any],
        time_limit: float,
    ) -> None:
        place, colon, self._name = factory.rpartition(":")
        if not colon or not place or not self._name:
            raise ModelError(f"no factory {factory!r}; name it as package.module:factory or folder/file.py:Factory")
        self._repository, self._worker = repository, worker
        self._kwargs, self._limit = dict(kwargs), time_limit
        self._module = "" if place.endswith(".py") else place.replace(".", "/")
        self._paths = repository.former_paths(self._path_of(place, commits))
        self._known: frozenset[str] = frozenset()

    def _path_of(self, place: str, commits: Sequence[Commit]) -> str:
        """The file that is named, below the given folder or the top: today's, or else the newest commit's that has it."""
        below = self._repository.prefix
        names = [f"{self._module}{end}" for end in (".py", "/__init__.py")] if self._module else [Path(place).as_posix()]
        starts = dict.fromkeys((below, f"{below}src/", "", "src/")) if self._module else dict.fromkeys((below, ""))
        choices = [start + name for start in starts for name in names]
        for choice in choices:
            if (self._repository.root / choice).exists() and any(self._repository.ids(commit, [choice])[choice] for commit in commits):
                return choice
        for commit in commits:
            ids = self._repository.ids(commit, choices)
            if any(ids.values()):
                return next(choice for choice in choices if ids[choice])
        raise ModelError(
            f"no commit of {str(self._repository.root)!r} has a file {choices[0]!r}; "
            "name the factory as package.module:factory or folder/file.py:Factory"
        )

    def build(self, commit: Commit) -> list[Built]:
        """Every attempt at a commit: the file that is known, else others that define the name, else names that are gone since."""
        present = [path for path, found in self._repository.ids(commit, self._paths).items() if found]
        with tempfile.TemporaryDirectory(prefix="automatch-") as folder:
            links = self._repository.extract(commit, Path(folder))
            first = self._attempt(Path(folder), present[0], self._name, links) if present else None
            if first is not None and not first.lacks_name:
                if not first.error:
                    self._known = frozenset(self._defined(Path(folder) / present[0]))
                return [first]
            others = [path for path in self._repository.defining(commit, self._name.split(".")[0]) if path not in present]
            attempts = [self._attempt(Path(folder), path, self._name, links) for path in others[:_MOST]]
            if not others and present and self._known:
                names = [name for name in self._defined(Path(folder) / present[0]) if name not in self._known]
                attempts = [self._attempt(Path(folder), present[0], name, links) for name in names[:_MOST]]
        gone = first or Built(f"{self._paths[0]}:{self._name}", error="the file does not exist yet", rests_on=frozenset({""}))
        return [gone, *attempts]

    def _defined(self, file: Path) -> list[str]:
        return _DEFINED.findall(file.read_text(encoding="utf-8", errors="replace")) if file.exists() else []

    def _attempt(self, folder: Path, path: str, name: str, links: Sequence[str]) -> Built:
        result = self._worker.build(folder, path, self._module, name, self._kwargs, self._limit)
        used = result.get("files")
        rests_on = {path, *self._paths} | (set(used) if used is not None else {_folder(path)})
        # What a submodule holds is told by its commit.
        rests_on = {next((link for link in links if used.startswith(f"{link}/")), used) for used in rests_on}
        lacks_name = bool(result.get("lacks_name"))
        if lacks_name:  # another commit may define it anywhere
            rests_on.add("")
        shapes = {str(key): tuple(int(size) for size in shape) for key, shape, _ in result.get("entries", ())}
        return Built(f"{path}:{name}", shapes, result.get("error", ""), frozenset(rests_on), lacks_name)


def _folder(path: str) -> str:
    """The top folder of the package that a file is part of; everything for a file at the top."""
    parts = path.split("/")
    if len(parts) == 1:
        return ""
    return "/".join(parts[:2]) if parts[0] == "src" and len(parts) > 2 else parts[0]
