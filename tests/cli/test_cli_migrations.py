"""accept, check and snapshot from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from handmade import mapping_of
from torch import nn

import automatch

OLD = {"body.weight": torch.ones(3, 3), "body.bias": torch.zeros(3)}
FEEDS = {"layer.weight": "body.weight", "layer.bias": "body.bias"}
MODEL = """
from torch import nn

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a reference checkpoint, the renamed model, and a reviewed mapping from one to the other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "renamed_model.py").write_text(MODEL)
    torch.save(OLD, "reference.pt")
    model = nn.ModuleDict({"layer": nn.Linear(3, 3)})
    mapping_of(model, "reference.pt", FEEDS).save("m.json")
    return tmp_path


def test_check_accept_check(cli, project: Path) -> None:
    before = cli("check", "reference.pt", "--model", "renamed_model.py:Renamed")
    assert before.exit_code == 1
    assert before.stdout.startswith("broken: reference.pt no longer loads into Renamed")
    accepted = cli("accept", "m.json", "--model", "renamed_model.py:Renamed")
    assert accepted.exit_code == 0
    (path,) = (project / "automatch_migrations").glob("*.json")
    assert accepted.stdout == f"{path}: 2 keys; automatch.load uses it from now on\n"
    after = cli("check", "reference.pt", "--model", "renamed_model.py:Renamed", "--json")
    assert after.exit_code == 0
    assert json.loads(after.stdout)["how"] == "migrated"


def test_accept_refuses_mappings_for_other_models(cli, project: Path) -> None:
    (project / "renamed_model.py").write_text(MODEL.replace("layer", "other"))
    result = cli("accept", "m.json", "--model", "renamed_model.py:Renamed")
    assert result.exit_code == 2
    assert "made for another model" in result.stderr
    assert not (project / "automatch_migrations").exists()
    assert cli("accept", "m.json", "--model", "reference.pt").exit_code == 2
    assert cli("check", "reference.pt", "--model", "reference.pt").exit_code == 2


def test_accept_into_a_folder_and_over_another_one(cli, project: Path) -> None:
    command = ("accept", "m.json", "--model", "renamed_model.py:Renamed", "--folder", "kept")
    assert cli(*command).exit_code == 0
    mapping = automatch.KeyMapping.load("m.json")
    mapping.decide("layer.bias", None).save("m.json")
    refused = cli(*command)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert cli(*command, "--overwrite").exit_code == 0


def test_snapshot_is_shown_and_its_sources_extracted(cli, project: Path) -> None:
    assert cli("snapshot", "reference.pt").exit_code == 1
    automatch.save_snapshot(nn.Linear(3, 3), "s.pt", sample=torch.ones(1, 3))
    loaded = torch.load("s.pt", weights_only=True)
    loaded["automatch_snapshot"]["sources"] = automatch_pack({"pkg/net.py": "x = 1\n"})
    torch.save(loaded, "s.pt")
    shown = cli("snapshot", "s.pt", "--extract", "out")
    assert shown.exit_code == 0
    assert "model: torch.nn.modules.linear.Linear\n" in shown.stdout
    assert "golden batch: 1 output tensors\n" in shown.stdout
    assert (project / "out" / "pkg" / "net.py").read_text() == "x = 1\n"
    assert json.loads(cli("snapshot", "s.pt", "--json").stdout)["sources"] == ["pkg/net.py"]
    assert cli("snapshot", "s.pt", "--extract", "out").exit_code == 2


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "..\\evil.py", "C:evil.py"])
def test_sources_never_leave_their_folder(cli, project: Path, name: str) -> None:
    save_with({"sources": automatch_pack({"fine.py": "", name: "boom"})})
    result = cli("snapshot", "s.pt", "--extract", "out")
    assert result.exit_code == 2
    assert "outside of its folder; nothing is written" in result.stderr
    assert not (project / "out").exists()


@pytest.mark.parametrize("names", [("a", "a/b.py"), ("a\x1b[31m.py", "b.py"), ("a\0.py", "b.py")])
def test_sources_that_cannot_be_files_are_not_written(cli, project: Path, names: tuple[str, str]) -> None:
    save_with({"sources": automatch_pack(dict.fromkeys(names, ""))})
    result = cli("snapshot", "s.pt", "--extract", "out")
    assert result.exit_code == 2
    assert "cannot be a file's name here; nothing is written" in result.stderr
    assert not (project / "out").exists()


def test_a_snapshot_does_not_steer_the_terminal(cli, project: Path) -> None:
    save_with({"model": "net\x1b[2J\x1b]0;owned\x07", "versions": {"torch": "2\n3"}})
    shown = cli("snapshot", "s.pt").stdout
    assert "model: net\\x1b[2J\\x1b]0;owned\\x07\n" in shown
    assert "versions: torch 2\\n3\n" in shown


def save_with(changes: dict[str, object]) -> None:
    automatch.save_snapshot(nn.Linear(3, 3), "s.pt")
    loaded = torch.load("s.pt", weights_only=True)
    loaded["automatch_snapshot"].update(changes)
    torch.save(loaded, "s.pt")


def automatch_pack(data: object) -> str:
    from automatch.packing import pack

    return pack(data)
