"""Reading a repository's history: plumbing commands that write nothing, run no hook and apply no filter."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from automatch.errors import ModelError

# Beside the code itself, what a constructor may read at import.
_SUFFIXES = (".py", ".json", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".txt")
_MAX_BYTES = 2_000_000
_GIT = ("git", "--no-optional-locks", "-c", "core.quotePath=false", "-c", "log.showSignature=false")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit: its id, its date (ISO 8601) and the first line of its message."""

    id: str
    date: str
    subject: str


@dataclass(frozen=True, slots=True)
class Version:
    """One state of the files that matter, and the commits that have it, newest first."""

    commits: tuple[Commit, ...]
    path: str | None


class Repository:
    """A git repository that is only read.

    Args:
        place: any folder inside it.

    Raises:
        ModelError: there is no git, or no repository there.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self.root = Path(self._git("rev-parse", "--show-toplevel").decode().rstrip("\n"))
        self._place = self.root

    def _git(self, *arguments: str, given: bytes | None = None) -> bytes:
        try:
            done = subprocess.run([*_GIT, *arguments], cwd=self._place, input=given, capture_output=True, check=False)
        except OSError as error:
            raise ModelError(f"cannot run git in {str(self._place)!r}: {error}; is git installed, and is this a folder?") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise ModelError(f"git {arguments[0]} failed in {str(self._place)!r}: {said}")
        return done.stdout

    def commits(self, *, everywhere: bool = False) -> list[Commit]:
        """The commits that HEAD (or any branch) has, newest first."""
        text = self._git("log", "--date-order", "--format=%H%x00%cI%x00%s%x00", "--all" if everywhere else "HEAD", "--").decode(
            errors="replace"
        )
        fields = text.split("\0")
        return [Commit(fields[i].strip(), fields[i + 1], fields[i + 2]) for i in range(0, len(fields) - 3, 3)]

    def former_paths(self, path: str) -> list[str]:
        """The path of a file and those it had before it was renamed, newest first."""
        log = self._git("log", "--follow", "-M", "--name-status", "--format=", "HEAD", "--", path).decode(errors="replace")
        found = [path, *(line.split("\t")[1] for line in log.splitlines() if line.startswith("R"))]
        return list(dict.fromkeys(found))

    def versions(self, commits: Sequence[Commit], paths: Sequence[str]) -> list[Version]:
        """The distinct states of the Python files around ``paths``, in the order of their newest commit."""
        folders = sorted({_folder(path) for path in paths})
        trees = self._objects([f"{commit.id}:{folder}" for commit in commits for folder in folders])
        groups: dict[tuple[str, ...], list[Commit]] = {}
        for place, commit in enumerate(commits):
            groups.setdefault(tuple(trees[place * len(folders) : (place + 1) * len(folders)]), []).append(commit)
        versions: dict[str, list[Commit]] = {}
        chosen: dict[str, str | None] = {}
        for group in groups.values():
            files = self.files(group[0], folders)
            state = hashlib.sha256(
                "\0".join(f"{name}\0{blob}" for name, blob in files.items() if name.endswith(".py")).encode("utf-8", "surrogateescape")
            ).hexdigest()
            versions.setdefault(state, []).extend(group)
            chosen[state] = next((path for path in paths if path in files), None)
        order = {commit.id: place for place, commit in enumerate(commits)}
        sorted_versions = [Version(tuple(sorted(found, key=lambda c: order[c.id])), chosen[state]) for state, found in versions.items()]
        return sorted(sorted_versions, key=lambda version: order[version.commits[0].id])

    def _objects(self, names: Iterable[str]) -> list[str]:
        """The object ids behind names like ``commit:folder``; "missing" where there is none."""
        text = self._git(
            "cat-file", "--batch-check=%(objectname)", given="\n".join(names).encode("utf-8", "surrogateescape") + b"\n"
        ).decode(errors="surrogateescape")
        return ["missing" if line.endswith(" missing") else line for line in text.splitlines()]

    def files(self, commit: Commit, folders: Sequence[str] = ("",)) -> dict[str, str]:
        """Path and blob id of every regular file of a commit below the folders."""
        listing = self._git("ls-tree", "-r", "-z", "--full-tree", commit.id, "--", *(folder for folder in folders if folder))
        files: dict[str, str] = {}
        for entry in listing.decode("utf-8", "surrogateescape").split("\0"):
            head, tab, path = entry.partition("\t")
            if tab and head.startswith("100"):
                files[path] = head.split()[2]
        return files

    def extract(self, commit: Commit, folder: Path) -> None:
        """Write the code of a commit, and the small text files beside it, below ``folder``."""
        wanted = {path: blob for path, blob in self.files(commit).items() if path.endswith(_SUFFIXES)}
        text = self._git("cat-file", "--batch", given="\n".join(wanted.values()).encode() + b"\n")
        at = 0
        for path in wanted:
            end = text.index(b"\n", at)
            size = int(text[at:end].split()[2])
            target = folder / path
            inside = target.resolve().is_relative_to(folder.resolve())
            if inside and size <= _MAX_BYTES:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text[end + 1 : end + 1 + size])
            at = end + 1 + size + 1


def _folder(path: str) -> str:
    """The top folder of the package that a file is part of; everything for a file at the top."""
    parts = path.split("/")
    if len(parts) == 1:
        return ""
    return "/".join(parts[:2]) if parts[0] == "src" and len(parts) > 2 else parts[0]
