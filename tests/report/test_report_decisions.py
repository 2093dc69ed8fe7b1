from __future__ import annotations

from typing import Any

import pytest
import report_zoo as zoo

from automatch.errors import MappingError
from automatch.report.decisions import apply_decisions

NORM = "model.blocks.0.norm1.weight"


def test_nothing_decided_is_the_same_mapping() -> None:
    mapping = zoo.transformer()
    assert apply_decisions(mapping, {"answers": [], "decisions": []}) == mapping


def test_accepting_keeps_the_evidence() -> None:
    mapping = zoo.transformer()
    before = mapping[NORM]
    after = apply_decisions(mapping, {"decisions": [[NORM, list(before.sources), {"op": "copy"}]]})[NORM]
    assert (after.confidence, after.decided, after.evidence) == (1.0, True, before.evidence)


def test_rejecting_leaves_the_key_unfed() -> None:
    mapping = apply_decisions(zoo.transformer(), {"decisions": [["model.embed.weight", None, None]]})
    assert "model.embed.weight" in mapping.missing_keys
    assert "bert.embeddings.weight" in mapping.unexpected_keys


def test_a_decision_wins_over_an_answer() -> None:
    decided = {"answers": [["q1", 1]], "decisions": [[NORM, ["bert.encoder.layer.0.norm_a.weight"], {"op": "copy"}]]}
    mapping = apply_decisions(zoo.transformer(), decided)
    assert mapping[NORM].sources == ("bert.encoder.layer.0.norm_a.weight",)
    assert mapping["model.blocks.1.norm1.weight"].sources == ("bert.encoder.layer.1.norm_b.weight",)
    assert mapping.questions == ()


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ([], "must be an object"),
        ({"answers": [["q1"]]}, "answers must be a list"),
        ({"answers": [["q9", 0]]}, "no question 'q9'"),
        ({"answers": [["q1", 7]]}, "no option 7"),
        ({"answers": [["q1", None]]}, "an answer must be"),
        ({"decisions": [["x"]]}, "decisions must be a list"),
        ({"decisions": [["nowhere", None, None]]}, "'nowhere' is not a key of the model"),
        ({"decisions": [[NORM, ["nowhere"], {"op": "copy"}]]}, "'nowhere' is not a key of the checkpoint"),
        ({"decisions": [[NORM, "bert.embeddings.weight", {"op": "copy"}]]}, "must be a list of checkpoint keys or null"),
        ({"decisions": [[NORM, ["bert.embeddings.weight"], {"op": "copy"}]]}, "gives shape"),
        ({"decisions": [[NORM, ["bert.embeddings.weight"], {"op": "melt"}]]}, "unknown transform op 'melt'"),
        ({"decisions": [[NORM, ["bert.embeddings.weight"], None]]}, "does not fit"),
    ],
)
def test_decisions_that_do_not_fit_are_refused(decisions: Any, message: str) -> None:
    with pytest.raises(MappingError, match=message):
        apply_decisions(zoo.transformer(), decisions)
