"""Generated cases are repeatable, well formed, and their truth fits the shapes."""

from __future__ import annotations

import random

import corpus_cases
import generator
import pytest
from module_tree import entries_of, template, tree_of
from refactorings import REFACTORINGS

from automatch.transforms import Concat, Copy, Permute, Slice, Stack, output_shape


def transform_of(true):
    match true["op"]:
        case "copy":
            return Copy()
        case "permute":
            return Permute(tuple(true["dims"]))
        case "concat":
            return Concat(true["dim"])
        case "stack":
            return Stack(true["dim"])
        case _:
            return Slice(true["dim"], true["start"], true["length"])


@pytest.mark.parametrize("seed", range(len(generator.KINDS)))
def test_case_is_well_formed(seed):
    case = generator.generate(seed)
    source = {key: tuple(shape) for key, shape, *_ in case["source"]["entries"]}
    target = {key: tuple(shape) for key, shape, *_ in case["target"]["entries"]}
    assert list(corpus_cases.skeleton(case).state_dict()) == list(target)
    assert case["truth"].keys() <= target.keys()
    for key, true in case["truth"].items():
        assert output_shape(transform_of(true), [source[s] for s in true["sources"]]) == target[key]


def test_same_seed_same_case():
    assert generator.generate(3) == generator.generate(3)
    assert generator.generate(3) != generator.generate(3 + len(generator.KINDS))


def test_tree_round_trip():
    case = next(corpus_cases.load_cases(["trap-cyclegan"]))
    entries, modules, truth = entries_of(tree_of(case["target"]))
    assert entries == case["target"]["entries"]
    assert modules == {"": "Model"} | case["target"]["modules"]
    assert all(true == {"op": "copy", "sources": [key]} for key, true in truth.items())


def test_template_hides_only_index_numbers():
    assert template("layer1.0.conv2") == "layer1.#.conv2"


@pytest.mark.parametrize("name", sorted(REFACTORINGS))
def test_refactoring_leaves_a_model_without_a_place_for_it_alone(name):
    root = tree_of({"entries": [["weight", [3], "float32", "param"]], "modules": {"": "Scale"}})
    if REFACTORINGS[name](root, random.Random(0)) is None:
        assert entries_of(root)[0] == [["weight", [3], "float32", "param"]]
    else:
        assert name == "wrap"
