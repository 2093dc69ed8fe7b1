"""The commit whose class fits is found among renames, broken versions and merges; the repository stays as it was."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from automatch.errors import ModelError
from automatch.find_commit import Fit, find_commit


class Git:
    """A repository written as one `git fast-import` stream, every commit a minute after the last."""

    def __init__(self, root: Path) -> None:
        self.root, self.count, self._stream = root, 0, bytearray()
        root.mkdir()
        self("init", "-q", "-b", "main")

    def __call__(self, *arguments: str, given: bytes | None = None) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.root, input=given, capture_output=True, check=True)
        return done.stdout.decode().strip()

    def commit(self, message: str, files: dict[str, str], *, branch: str = "main", parents: tuple[int, ...] = (), lines: str = "") -> int:
        """Add a commit and return its mark."""
        self.count += 1
        who = f"T <t@example.org> {1704067200 + 60 * self.count} +0000"
        text = f"commit refs/heads/{branch}\nmark :{self.count}\nauthor {who}\ncommitter {who}\ndata {len(message)}\n{message}\n"
        text += "".join(f"{'merge' if place else 'from'} :{mark}\n" for place, mark in enumerate(parents)) + lines
        text += "".join(f"M 100644 inline {name}\ndata {len(content)}\n{content}\n" for name, content in files.items())
        self._stream += text.encode()
        return self.count

    def write(self) -> dict[int, str]:
        """Import what was committed, check main out, and return mark to commit id."""
        self("fast-import", "--quiet", f"--export-marks={self.root / '.git' / 'marks'}", given=bytes(self._stream))
        self("reset", "-q", "--hard", "main")
        lines = (self.root / ".git" / "marks").read_text().splitlines()
        return {int(mark[1:]): commit for mark, commit in (line.split() for line in lines)}

    def state(self) -> tuple[str, ...]:
        files = sorted(str(path) for path in self.root.rglob("*") if ".git/" not in f"{path}/" or path.name in ("HEAD", "index"))
        return self("status", "--porcelain"), self("rev-parse", "HEAD"), self("worktree", "list"), self("stash", "list"), *files


def code(name: str, width: int) -> str:
    return (
        "from torch import nn\n\nfrom .parts import block\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, classes=2):\n        super().__init__()\n"
        f"        self.{name} = block({width})\n        self.head = nn.Linear({width}, classes)\n"
    )


PARTS = "from torch import nn\n\n\ndef block(width):\n    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))\n"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Git, dict[str, str]]:
    """200 commits: the class changes in many of them, its file is renamed, it breaks, and one version lives on a merged branch."""
    git = Git(tmp_path_factory.mktemp("find") / "repo")
    marks = {"0": git.commit("start", {"pkg/__init__.py": "", "pkg/parts.py": PARTS, "pkg/net.py": code("body", 4)})}
    for number in range(1, 120):
        if number % 5 == 0:
            files = {"pkg/net.py": code("body", 4 + number)}
        elif number % 17 == 0:
            files = {"pkg/net.py": "def class Net:\n"}
        elif number % 23 == 0:
            files = {"pkg/net.py": "import sys\nsys.exit(3)\n"}
        else:
            files = {"notes.txt": str(number)}
        marks[str(number)] = git.commit(f"change {number}", files)
    main = git.count
    side = marks["60"]
    for number in range(20):
        files = {7: {"pkg/net.py": code("branch", 8)}, 19: {"pkg/net.py": code("body", 64)}}.get(number, {})
        side = marks[f"side {number}"] = git.commit(f"side {number}", files, branch="side", parents=(side,))
    git.commit("merge side", {}, parents=(main, side))
    git.commit("rename the file", {}, lines="R pkg/net.py pkg/model.py\n")
    for number in range(58):
        git.commit(
            f"later {number}", {"pkg/model.py": code("trunk", 200 + number)} if number % 4 == 0 else {"notes.txt": f"later {number}"}
        )
    ids = git.write()
    assert git("rev-list", "--count", "HEAD") == "200"
    return git, {name: ids[mark] for name, mark in marks.items()}


def checkpoint(name: str, width: int, folder: Path, prefix: str = "") -> Path:
    body = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))
    model = nn.ModuleDict({name: body, "head": nn.Linear(width, 2)})
    torch.save({"state_dict": {prefix + key: tensor for key, tensor in model.state_dict().items()}}, folder / "old.ckpt")
    return folder / "old.ckpt"


def test_the_commit_is_found_before_a_rename_of_the_file(history: tuple[Git, dict[str, str]], tmp_path: Path) -> None:
    git, found = history
    before = git.state()
    seen: list[tuple[int, int, Fit]] = []
    ckpt = checkpoint("body", 4 + 80, tmp_path)
    search = find_commit(ckpt, "pkg.model:Net", git.root, run_old_code=True, progress=lambda *step: seen.append(step))
    assert search.best is not None
    assert search.best.exact
    assert found["80"] in [commit.id for commit in search.best.commits]
    assert search.best.commits[-1].subject == "change 80"
    assert search.n_commits == 200
    assert len(seen) == len(search.tried) < 60
    assert [fit.commits[0] for _, _, fit in seen] == [fit.commits[0] for fit in search.tried]
    assert {total for _, total, _ in seen} == {200}
    assert any("SyntaxError" in fit.error for fit in search.tried)
    assert git.state() == before


def test_the_commit_of_a_merged_branch_is_found_under_a_wrapper(history: tuple[Git, dict[str, str]], tmp_path: Path) -> None:
    git, found = history
    search = find_commit(checkpoint("branch", 8, tmp_path, "model."), "pkg/model.py:Net", git.root / "pkg", run_old_code=True)
    assert search.best is not None
    assert search.best.exact
    assert search.best.prefix == "model."
    assert search.best.commits[-1].id == found["side 7"]
    assert search.best.commits[-1].subject == "side 7"


def test_without_an_exact_fit_the_closest_is_given_with_its_differences(history: tuple[Git, dict[str, str]], tmp_path: Path) -> None:
    git, _ = history
    ckpt = checkpoint("trunk", 200, tmp_path)
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    state["extra.weight"] = state.pop("trunk.1.bias")
    search = find_commit(state, "pkg.model:Net", git.root, run_old_code=True)
    assert search.best is not None
    assert not search.best.exact
    assert search.best.commits[-1].subject == "later 0"
    assert (search.best.missing, search.best.unexpected) == (("trunk.1.bias",), ("extra.weight",))
    assert sum(len(fit.commits) for fit in search.tried) == 200
    assert any(fit.error == "SystemExit: 3" for fit in search.tried)


@pytest.fixture
def small(tmp_path: Path) -> Git:
    git = Git(tmp_path / "repo")
    linear = "from torch import nn\n\n\ndef build(width=2):\n    return nn.Linear(width, 2)\n"
    git.commit("good", {"src/pkg/__init__.py": "", "src/pkg/net.py": linear})
    git.commit("crash", {"src/pkg/net.py": "import os\n\n\ndef build(width=2):\n    os.abort()\n"})
    git.commit("hang", {"src/pkg/net.py": "import time\n\n\ndef build(width=2):\n    time.sleep(1000)\n"})
    git.commit("prints", {"src/pkg/net.py": "print('{}')\n\n\ndef build(width=2):\n    return None\n"})
    git.write()
    return git


def test_a_version_that_hangs_or_crashes_is_passed_over(small: Git) -> None:
    state = nn.Linear(5, 2).state_dict()
    search = find_commit(state, "pkg.net:build", small.root, run_old_code=True, kwargs={"width": 5}, time_limit=5)
    assert search.best is not None
    assert search.best.commits[0].subject == "good"
    errors = [fit.error for fit in search.tried]
    assert "has no attribute" in errors[0]
    assert errors[1:] == ["took longer than 5 s", "the process that built it crashed", ""]


NET = "from torch import nn\n\n\nclass {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.fc = {layer}\n"


def net(width: int, name: str = "Net", layer: str = "nn.Linear({}, 2)") -> str:
    return NET.format(name=name, layer=layer.format(width))


WIDTH = "from pathlib import Path\n\nwidth = int(Path({}).read_text())\n"
BESIDE = net(0, layer="nn.Linear(width, 2)")
HISTORIES: dict[str, tuple[str, list[tuple[dict[str, str], str]]]] = {
    "another package changes": (
        "pkg.net:Net",
        [({"lib/parts.py": f"width = {width}\n", "pkg/net.py": "from lib.parts import width\n" + BESIDE}, "") for width in (3, 4, 5)],
    ),
    "a file that is read changes": (
        "pkg.net:Net",
        [({"cfg/net.txt": str(width), "pkg/net.py": WIDTH.format("'cfg/net.txt'") + BESIDE}, "") for width in (3, 4, 5)],
    ),
    "a module appears": (
        "pkg.net:Net",
        [
            ({"lib/parts.py": "width = 3\n", "pkg/net.py": "from lib.parts import width\n" + BESIDE}, ""),
            ({}, "D lib/parts.py\n"),
            ({"notes.txt": ""}, ""),
        ],
    ),
    "the class moves": (
        "pkg.net:Net",
        [
            ({"pkg/all.py": net(3) + "\n\ndef other():\n    return 1\n"}, ""),
            ({"pkg/all.py": "def other():\n    return 1\n", "pkg/net.py": net(4)}, ""),
        ],
    ),
    "the class is renamed": ("net:NewNet", [({"net.py": net(3, "OldNet")}, ""), ({"net.py": net(4, "NewNet")}, "")]),
    "a package below the given folder": (
        "pkg.net:Net",
        [
            (
                {
                    "ml/pkg/__init__.py": "",
                    "ml/pkg/parts.py": f"width = {width}\n",
                    "ml/pkg/net.py": "from pkg.parts import width\n" + BESIDE,
                },
                "",
            )
            for width in (3, 4)
        ],
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_whatever_changed_with_the_class_is_followed(name: str, tmp_path: Path) -> None:
    factory, commits = HISTORIES[name]
    git = Git(tmp_path / "repo")
    for number, (files, lines) in enumerate(commits):
        git.commit(f"commit {number}", files, lines=lines)
    git.write()
    place = git.root / "ml" if (git.root / "ml").exists() else git.root
    search = find_commit(nn.ModuleDict({"fc": nn.Linear(3, 2)}).state_dict(), factory, place, run_old_code=True)
    assert search.best is not None
    assert search.best.exact
    assert search.best.commits[0].subject == "commit 0"
    assert search.best.factory.endswith(":OldNet" if "renamed" in name else ":Net")


def test_a_submodule_a_worktree_and_a_shallow_clone_stay_as_they_are(tmp_path: Path) -> None:
    library, git = Git(tmp_path / "library"), Git(tmp_path / "repo")
    library.commit("parts", {"parts.py": "width = 3\n"})
    library.write()
    git.commit("start", {"notes.txt": ""})
    git.write()
    who = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false", "-c", "protocol.file.allow=always")
    git(*who, "submodule", "--quiet", "add", str(library.root), "lib")
    (git.root / "net.py").write_text("from lib.parts import width\n" + BESIDE)
    for number in (3, 4, 5):
        if number > 3:
            library.commit(f"parts {number}", {"parts.py": f"width = {number}\n"}, parents=(number - 3,))
            library.write()
            subprocess.run(["git", *who, "pull", "-q"], cwd=git.root / "lib", check=True)
        git("add", "-A")
        git(*who, "commit", "-q", "-m", f"width {number}")
    (git.root / "net.py").write_text("not committed, and broken (")
    state = nn.ModuleDict({"fc": nn.Linear(3, 2)}).state_dict()
    git("worktree", "add", "-q", "-b", "other", str(tmp_path / "worktree"))
    git("clone", "-q", "--depth", "1", git.root.as_uri(), str(tmp_path / "shallow"))
    before = git.state()
    search = find_commit(state, "net:Net", git.root, run_old_code=True)
    assert search.best is not None
    assert (search.best.exact, search.best.commits[0].subject, search.shallow) == (True, "width 3", False)
    assert git.state() == before
    assert (git.root / "net.py").read_text() == "not committed, and broken ("
    assert find_commit(state, "net:Net", tmp_path / "worktree", run_old_code=True).n_commits == 4
    shallow = find_commit(state, "net:Net", tmp_path / "shallow", run_old_code=True)
    assert (shallow.n_commits, shallow.shallow) == (1, True)


def test_consent_repository_and_file_are_asked_for(small: Git, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"runs your own old code; pass run_old_code=True"):
        find_commit({}, "pkg.net:build", small.root)
    state = nn.Linear(2, 2).state_dict()
    with pytest.raises(ModelError, match="git rev-parse failed in"):
        find_commit(state, "pkg.net:build", tmp_path, run_old_code=True)
    with pytest.raises(ModelError, match=r"has a file 'other/net\.py'"):
        find_commit(state, "other.net:build", small.root, run_old_code=True)
    with pytest.raises(ModelError, match=r"no factory 'pkg\.net'; name it as"):
        find_commit(state, "pkg.net", small.root, run_old_code=True)
