"""The speed benchmark's parts run and its page holds what was measured; no time is asserted."""

from __future__ import annotations

import json

import pytest
import speed
import speed_inputs
import speed_tables
import speed_tasks


@pytest.mark.parametrize(
    ("name", "keys", "fed"), [("experts:2:3", 35, 35), ("random:50", 50, 0), ("corpus:trap-mlp-dropout-inserted", 14, 14)]
)
def test_inputs(name, keys, fed):
    case = speed_inputs.case_of(name)
    for side in ("source", "target"):
        assert len({entry[0] for entry in case[side]["entries"]}) == keys
    assert len(case["truth"]) == fed


def test_sizes_of_the_growth_series_are_what_they_say():
    for keys, name in list(speed.GROWTH.items())[:2]:
        assert len(speed_inputs.case_of(name)["target"]["entries"]) == keys


@pytest.mark.parametrize("tool", ["automatch", "hungarian"])
def test_propose_task(tool):
    row = speed_tasks.propose("experts:1:2", tool, "2")
    assert len(row["seconds"]) == 2
    assert row["keys"] == row["true"] == 16
    assert row["matches"] >= row["right"] > 0


def test_load_task(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_tasks, "WIDTH", 64)
    assert speed_tasks.write(str(tmp_path), "0.0002")["blocks"] == 1
    assert speed_tasks.load(str(tmp_path), "torch", "copy")["seconds"] > 0
    assert speed_tasks.load(str(tmp_path), "torch", "assign")["peak_megabytes"] > 0


def test_page_and_history(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "task", lambda _, *arguments, timeout: speed_tasks.propose(*arguments) | {"status": "answered"})
    output = tmp_path / "speed.json"
    speed.main(["--only", "small", "--tools", "hungarian", "--repeats", "1", "--output", str(output)])
    page = output.with_suffix(".md").read_text()
    assert page.count("| plain Hungarian |") == len(speed.SMALL)
    assert json.loads((tmp_path / "speed_history.jsonl").read_text())["parts"] == ["small"]
    assert speed_tables.seconds_of({"seconds": [9.0, 1.0, 3.0, 2.0]}) == 2.0


def test_time_out_is_a_result():
    row = speed.task("propose", "experts:1:2", "hungarian", "1000000", timeout=1)
    assert row == {"status": "no answer within 1 s"}
    page = speed_tables.markdown({"command": "x", "machine": "y", "small": {"tiny": {"hungarian": row}}})
    assert "| tiny | plain Hungarian | no answer within 1 s |" in page
