"""Where a model comes from: its own classes, their source files, their commit, and the libraries around them."""

from __future__ import annotations

import inspect
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_GIT_SECONDS = 10


def own_classes(model: nn.Module) -> list[type]:
    """The classes of a model's modules, and their bases, that are the user's own: from no installed package."""
    kinds = dict.fromkeys(type(module) for module in model.modules())
    classes = dict.fromkeys(cls for kind in kinds for cls in kind.__mro__)
    return [cls for cls in classes if source_file(cls) is not None]


def source_file(cls: type) -> Path | None:
    """The file that defines ``cls``, or None where it is installed, built in, or typed into a session."""
    try:
        path = Path(inspect.getsourcefile(cls) or "").resolve()
    except (TypeError, OSError):
        return None
    if path.suffix != ".py" or not path.is_file():
        return None
    paths = sysconfig.get_paths()
    installed = {Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    installed |= {Path(entry).resolve() for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))}
    return None if any(path.is_relative_to(folder) for folder in installed) else path


def package_root(cls: type, path: Path) -> Path:
    """The folder that holds the top package of ``cls``."""
    depth = cls.__module__.count(".") + (path.name == "__init__.py")
    return path.parents[min(depth, len(path.parents) - 1)]


def own_sources(classes: list[type], limit: int) -> dict[str, str]:
    """The source files of ``classes`` by their path inside their package; the smallest ones first, up to ``limit`` bytes."""
    files: dict[str, Path] = {}
    for cls in classes:
        path = source_file(cls)
        if path is not None:
            files[path.relative_to(package_root(cls, path)).as_posix()] = path
    kept: dict[str, str] = {}
    for name, path in sorted(files.items(), key=lambda item: (item[1].stat().st_size, item[0])):
        limit -= path.stat().st_size
        if limit < 0:
            break
        kept[name] = path.read_text(encoding="utf-8", errors="replace")
    return dict(sorted(kept.items()))


def git_commit(classes: list[type]) -> str | None:
    """The commit of the repository that holds the first of ``classes``, with ``+`` if it has changes; None without git."""
    path = next((found for found in map(source_file, classes) if found is not None), None)
    if path is None:
        return None
    try:
        commit = _git(path.parent, "rev-parse", "HEAD").strip()
        changed = _git(path.parent, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_GIT_SECONDS).stdout


def library_versions(model: nn.Module) -> dict[str, str]:
    """Python, torch, automatch, and the packages that the model's modules come from."""
    names = {type(module).__module__.partition(".")[0] for module in model.modules()} | {"torch", "automatch"}
    found = {"python": sys.version.split()[0]}
    for name in sorted(names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
