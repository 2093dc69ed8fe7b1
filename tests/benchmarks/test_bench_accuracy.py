"""The accuracy benchmark runs, and counts what it says it counts."""

from __future__ import annotations

import json

import accuracy
import baselines
import corpus_cases
import evaluate
import figures
import pytest

from automatch import KeyMapping, Match, Question
from automatch.mapping import Option, Side
from automatch.specs import StateSpec, TensorSpec

FAST = ["strict", "prefix", "suffix", "order", "hungarian"]


def test_page_has_every_tool(capsys):
    accuracy.main(
        ["trap-mlp", "tv-vgg11", "--processes", "1", "--print", "--tools", "automatch", *FAST, "--orders", "file", "--generated", "1"]
    )
    page = capsys.readouterr().out
    for title in ("**automatch**, as shipped", *(baselines.TITLES[tool] for tool in FAST)):
        assert f"| {title} | 2 |" in page
    assert "## Per refactoring" in page


def test_results_keep_what_was_not_run_again(tmp_path, capsys):
    output = tmp_path / "accuracy.json"
    common = ["--processes", "1", "--orders", "file", "--output", str(output)]
    accuracy.main(["trap-mlp", *common, "--tools", "automatch", "order"])
    data = json.loads(output.read_text())
    data = accuracy.merged(data, {"runs": [data["runs"][0] | {"again": True}]})
    assert [(run["tool"], "again" in run) for run in data["runs"]] == [("automatch", True), ("order", False)]
    assert output.with_suffix(".md").read_text().startswith("# Accuracy")


def test_results_of_several_machines_come_together(tmp_path, capsys):
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    for output, tool in ((here, "order"), (there, "strict")):
        accuracy.main(["trap-mlp", "--processes", "1", "--orders", "file", "--tools", tool, "--output", str(output)])
    accuracy.main(["--merge", str(there), "--output", str(here)])
    assert [run["tool"] for run in json.loads(here.read_text())["runs"]] == ["strict", "order"]
    assert "`python benchmarks/accuracy.py trap-mlp" in here.with_suffix(".md").read_text()


@pytest.mark.parametrize("tool", FAST)
def test_baseline_maps_a_model_onto_itself(tool):
    case = next(corpus_cases.load_cases(["trap-mlp"]))
    own = {"source": case["target"], "target": case["target"]}
    assert baselines.BASELINES[tool](own, case["target"]["entries"]) == {key: key for key, *_ in case["target"]["entries"]}


def test_suffix_refuses_what_fits_twice():
    case = {"target": {"entries": [["a.w", [1], "float32", "param"], ["b.w", [1], "float32", "param"]]}}
    with pytest.raises(baselines.RefusedError, match=r"'w' fits both 'a\.w' and 'b\.w'"):
        baselines.suffix(case, [["w", [1], "float32", "tensor"]])


def spin():
    while True:
        pass


def test_time_limit():
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"), baselines.time_limit(0.01):
        spin()


def twins() -> tuple[dict, KeyMapping]:
    """Two twins, the wrong way round, and the question that would settle them."""
    entries = {side: [[f"{side}{i}", [2], "float32", "param"] for i in (0, 1)] for side in "st"}
    truth = {f"t{i}": {"op": "copy", "sources": [f"s{i}"]} for i in (0, 1)}
    case = {"id": "twins", "family": "f", "source": {"entries": entries["s"]}, "target": {"entries": entries["t"]}, "truth": truth}
    straight = tuple(Match(f"t{i}", (f"s{i}",)) for i in (0, 1))
    crossed = tuple(Match(f"t{i}", (f"s{1 - i}",)) for i in (0, 1))
    sides = [Side.of(StateSpec(tuple(TensorSpec(key, (2,)) for key, *_ in entries[side]))) for side in "st"]
    question = Question("q1", "which?", (Option("crossed", crossed), Option("straight", straight)), ("t0", "t1"))
    return case, KeyMapping(*sides, crossed, questions=(question,))


def test_simulated_person_takes_the_true_option():
    case, mapping = twins()
    assert evaluate._truest(case, mapping.questions[0]) == 1
    assert evaluate._with_answers(case, mapping, perfect=False) == (True, True)


def test_simulated_person_passes_when_nothing_is_true():
    case, mapping = twins()
    case["truth"] = {key: {"op": "copy", "sources": ["elsewhere"]} for key in case["truth"]}
    assert evaluate._truest(case, mapping.questions[0]) is None
    assert evaluate._with_answers(case, mapping, perfect=False) == (False, False)


def test_figures_of_one_half_right_case():
    case, _ = twins()
    record = evaluate._record(case, {"matches": [{"target": t, "sources": ["s0"], "confidence": 1.0} for t in ("t0", "t1")]}, 0.5)
    found = figures.figures([record])
    assert (found["perfect_share"], found["macro_recall"], found["confident_precision"]) == (0.0, 0.5, 0.5)
    assert (found["ece"], found["brier"], found["wrong"], found["confident_wrong"]) == (0.5, 0.5, 1, 1)
    assert figures.histogram([record, record]) == [[1.0, 2, 4]]
