"""Reading a repository's history: plumbing commands that write nothing, run no hook and apply no filter."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from automatch.errors import ModelError

# Beside the code itself, what a constructor may read at import.
_SUFFIXES = (".py", ".json", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".txt")
_MAX_BYTES = 2_000_000
_AT_ONCE = 200  # names in flight to one process, so that neither side waits on a full pipe
_GIT = ("git", "--no-optional-locks", "-c", "core.quotePath=false", "-c", "log.showSignature=false")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit: its id, its date (ISO 8601) and the first line of its message."""

    id: str
    date: str
    subject: str


class Repository:
    """A git repository that is only read; a context manager around the process that looks objects up.

    Args:
        place: any folder inside it.

    Raises:
        ModelError: there is no git, or no repository there.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._lookup: subprocess.Popen[bytes] | None = None
        self._links: set[str] = set()
        lines = self._git("rev-parse", "--show-toplevel", "--show-prefix", "--is-shallow-repository").decode().split("\n")
        self.root, self.prefix, self.shallow = Path(lines[0]), lines[1], lines[2] == "true"
        self._place = self.root

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lookup is not None:
            self._lookup.communicate()

    def _git(self, *arguments: str, given: bytes | None = None, may_find_nothing: bool = False) -> bytes:
        try:
            done = subprocess.run([*_GIT, *arguments], cwd=self._place, input=given, capture_output=True, check=False)
        except OSError as error:
            raise ModelError(f"cannot run git in {str(self._place)!r}: {error}; is git installed, and is this a folder?") from error
        if done.returncode and not (may_find_nothing and done.returncode == 1):
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

    def ids(self, commit: Commit, paths: Iterable[str]) -> dict[str, str]:
        """The object id of every file and folder of a commit; empty where it has none of that name."""
        if self._lookup is None:
            self._lookup = subprocess.Popen(
                [*_GIT, "cat-file", "--batch-check=%(objectname)"], cwd=self.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        given, told = self._lookup.stdin, self._lookup.stdout
        assert given is not None
        assert told is not None
        names = [path for path in dict.fromkeys(paths) if "\n" not in path]
        found: dict[str, str] = {}
        for at in range(0, len(names), _AT_ONCE):
            some = names[at : at + _AT_ONCE]
            given.write("".join(f"{commit.id}:{name}\n" for name in some).encode("utf-8", "surrogateescape"))
            given.flush()
            for name in some:
                line = told.readline()
                found[name] = "" if line.endswith(b" missing\n") else line.decode().strip()
        links = self._links.intersection(found)
        if links:  # the commit of a submodule is no object of this repository
            for head, path in self._entries(commit.id, "--", *links):
                found[path] = head[2]
        return found

    def _entries(self, commit: str, *options: str) -> Iterator[tuple[list[str], str]]:
        """Mode, kind and id, and the path, of every entry of a commit's tree."""
        for entry in self._git("ls-tree", "-z", "--full-tree", commit, *options).decode("utf-8", "surrogateescape").split("\0"):
            head, tab, path = entry.partition("\t")
            if tab:
                yield head.split(), path

    def defining(self, commit: Commit, name: str) -> list[str]:
        """The Python files of a commit that define a class or function of that name at the top."""
        if not name.isidentifier():
            return []
        pattern = rf"^(class|def)[[:space:]]+{name}[^[:alnum:]_]|^{name}[[:space:]]*="
        found = self._git("grep", "-lzE", pattern, commit.id, "--", "*.py", may_find_nothing=True)
        return [path.partition(":")[2] for path in found.decode("utf-8", "surrogateescape").split("\0") if path]

    def extract(self, commit: Commit, folder: Path) -> list[str]:
        """Write the code of a commit, and the small text files beside it, below ``folder``.

        Returns:
            The paths of its submodules; those that are checked out are written too.
        """
        return self._extract(commit.id, folder)

    def _extract(self, commit: str, folder: Path) -> list[str]:
        entries = list(self._entries(commit, "-r"))
        wanted = {path: head[2] for head, path in entries if head[0].startswith("100") and path.endswith(_SUFFIXES)}
        self._write(wanted, folder)
        links = [(path, head[2]) for head, path in entries if head[0] == "160000"]
        for path, inner in links:
            if (self.root / path / ".git").exists():
                with suppress(ModelError):  # that commit of it is not here
                    Repository(self.root / path)._extract(inner, folder / path)
        self._links.update(path for path, _ in links)
        return [path for path, _ in links]

    def _write(self, wanted: dict[str, str], folder: Path) -> None:
        text = self._git("cat-file", "--batch", given="\n".join(wanted.values()).encode() + b"\n") if wanted else b""
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
