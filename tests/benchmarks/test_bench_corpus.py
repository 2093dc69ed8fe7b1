"""The corpus comes to life as it was recorded, and the scoring rule says what it says it does."""

from __future__ import annotations

import corpus_cases
import pytest
import scoring
from families import GROUPS, by_group, group_of

SMALL = ["trap-mlp", "openai-gpt2", "pwg-hifigan", "tv-vgg11_bn"]


@pytest.mark.parametrize("case", list(corpus_cases.load_cases(SMALL)), ids=lambda case: case["id"])
def test_skeleton_has_the_recorded_entries_and_classes(case):
    model = corpus_cases.skeleton(case)
    recorded = {key: tuple(shape) for key, shape, *_ in case["target"]["entries"]}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == recorded
    assert list(model.state_dict()) == list(recorded)
    assert {key for key, _ in model.named_buffers()} == {key for key, *_, kind in case["target"]["entries"] if kind == "buffer"}
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    assert classes.items() >= case["target"]["modules"].items()


def test_tied_skeleton_shares_its_parameters():
    case = next(corpus_cases.load_cases(["sam-vit-b"]))
    group = case["target"]["aliases"][0]
    tied, untied = corpus_cases.skeleton(case, tied=True), corpus_cases.skeleton(case)
    assert len({id(tied.state_dict(keep_vars=True)[key]) for key in group}) == 1
    assert len({id(untied.state_dict(keep_vars=True)[key]) for key in group}) == len(group)


def test_orders_hold_the_same_entries_and_shuffling_is_repeatable():
    case = next(corpus_cases.load_cases(["trap-mlp"]))
    file, by_key, shuffled = (list(corpus_cases.state_dict(case, order)) for order in corpus_cases.ORDERS)
    assert sorted(file) == by_key == sorted(shuffled)
    assert file == [entry[0] for entry in case["source"]["entries"]]
    assert shuffled == list(corpus_cases.state_dict(case, "shuffled")) != file
    with pytest.raises(ValueError, match="unknown order 'reversed'"):
        corpus_cases.state_dict(case, "reversed")


def test_every_family_of_the_corpus_is_in_one_group():
    cases = list(corpus_cases.load_cases())
    listed = [family for families, _ in GROUPS.values() for family in families]
    assert len(listed) == len(set(listed))
    assert {case["family"] for case in cases} == set(listed)
    assert sum(map(len, by_group(cases).values())) == len(cases)
    assert group_of("mixtral") == group_of("llama") != group_of("gpt2")
    assert group_of("a-new-one") == "a-new-one"


@pytest.fixture
def case():
    return {
        "id": "x",
        "family": "f",
        "source": {"entries": [["a", [1], "float32", "param"], ["b", [1], "float32", "param"]], "aliases": [["a", "a2"]]},
        "target": {
            "entries": [
                ["p", [1], "float32", "param"],
                ["q", [1], "float32", "param"],
                ["new", [1], "float32", "param"],
                ["buffer", [1], "float32", "buffer"],
                ["n.num_batches_tracked", [], "int64", "buffer"],
            ]
        },
        "truth": {"p": {"op": "copy", "sources": ["a"]}, "q": {"op": "permute", "sources": ["b"], "alt": [["c"]]}},
    }


def match(target, *sources, confidence=1.0, op="copy"):
    return {"target": target, "sources": list(sources), "confidence": confidence, "transform": {"op": op}}


@pytest.mark.parametrize(
    ("matches", "right", "exact", "wrong", "missed"),
    [
        ([], 0, 0, 0, 2),
        ([match("p", "a"), match("q", "b", op="permute")], 2, 2, 0, 0),
        ([match("p", "a2"), match("q", "c")], 2, 1, 0, 0),
        ([match("p", "b"), match("q", "b", op="chain")], 1, 1, 1, 0),
        ([match("p", "a"), match("new", "b")], 1, 1, 1, 1),
        ([match("p", "a", "b"), match("buffer", "b"), match("n.num_batches_tracked", "b")], 0, 0, 1, 1),
    ],
)
def test_score(case, matches, right, exact, wrong, missed):
    scored = scoring.score_case(case, {"matches": matches})
    assert (scored["right"], scored["exact"], scored["wrong"], scored["missed"]) == (right, exact, wrong, missed)
    assert scored["perfect"] == (wrong == missed == 0)


def test_no_mapping_is_all_missed(case):
    assert scoring.score_case(case, None)["missed"] == 2


def test_calibration_error():
    assert scoring.expected_calibration_error([(1.0, 1, 1), (0.0, 0, 1)]) == 0
    assert scoring.expected_calibration_error([(0.75, 1, 2)]) == pytest.approx(0.25)
    assert scoring.expected_calibration_error([]) == 0
