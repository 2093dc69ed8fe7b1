"""``automatch find-commit`` asks before it runs old code, and reports the commit or the closest one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from automatch.cli import main

CODE = "from torch import nn\n\n\ndef build():\n    return nn.Linear({width}, 2)\n"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    who = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=folder, check=True)
    for width in (3, 5):
        (folder / "net.py").write_text(CODE.format(width=width))
        subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
        subprocess.run(["git", *who, "commit", "-q", "-m", f"width {width}"], cwd=folder, check=True)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "old.pt")
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "other.pt")
    return folder


def test_the_commit_is_reported(repo: Path) -> None:
    base = ["find-commit", "-f", "net:build", "--repo", str(repo), "--yes"]
    done = CliRunner().invoke(main, [*base, str(repo.parent / "old.pt")])
    assert done.exit_code == 0, done.output
    assert "2 commits; 2 distinct versions of the model's code were tried, 0 could not be built, " in done.stdout
    assert done.stdout.splitlines()[1].startswith("Exact fit: ")
    assert done.stdout.splitlines()[1].endswith("width 3")
    closest = CliRunner().invoke(main, [*base, "--json", str(repo.parent / "other.pt")])
    assert closest.exit_code == 1
    data = json.loads(closest.stdout)
    assert data["tried"][data["best"]]["mismatched"] == ["weight"]


def test_without_consent_nothing_runs(repo: Path) -> None:
    done = CliRunner().invoke(main, ["find-commit", str(repo.parent / "old.pt"), "-f", "net:build", "--repo", str(repo)])
    assert done.exit_code == 2
    assert "runs the old code of this repository" in done.stderr
    assert "give --yes to agree" in done.stderr
