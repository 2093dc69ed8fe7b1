"""The reliability diagram counts every pair once, and is drawn from the run that was left out where there is one."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import reliability


def run(tables="shipped", tool="automatch"):
    figures = {"right": 9, "wrong": 1, "cases": 2, "brier": 0.1, "ece": 0.02}
    return {"tool": tool, "tables": tables, "order": "file", "figures": figures, "histogram": [[0.25, 1, 2], [0.999, 3, 3], [1.0, 5, 5]]}


def test_bins_hold_every_pair_once():
    bins = reliability.bins_of(run()["histogram"])
    assert [(one.low, one.right, one.pairs) for one in bins] == [(0.2, 1, 2), (0.999, 8, 8)]
    assert bins[0].share == 0.5
    for one in bins:
        low, high = one.interval()
        assert 0 <= low <= one.share <= high <= 1


def test_left_out_run_comes_first():
    assert reliability.choose([run(), run("left-out")])["tables"] == "left-out"
    with pytest.raises(SystemExit, match=r"run benchmarks/accuracy\.py first"):
        reliability.choose([run(tool="order")])


def test_files(tmp_path, capsys):
    source = tmp_path / "accuracy.json"
    source.write_text(json.dumps({"runs": [run()]}))
    reliability.main(["--accuracy", str(source), "--output", str(tmp_path)])
    assert ET.parse(tmp_path / "reliability.svg").getroot().tag.endswith("svg")
    assert "Brier score 0.10000" in (tmp_path / "reliability.md").read_text()
