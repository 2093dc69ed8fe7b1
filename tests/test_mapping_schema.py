from __future__ import annotations

import json
from importlib.resources import files

import jsonschema
import pytest
import torch
from handmade import mapping_of
from torch import nn

from automatch.errors import MappingError
from automatch.mapping import Alternative, KeyMapping, Match, Option, Question, Verdict
from automatch.matching import propose_mapping
from automatch.transforms import Adapt, Chain, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack

SCHEMA = json.loads(files("automatch").joinpath("mapping.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

TRANSFORMS = [
    Copy(),
    Reshape((2, 3)),
    Permute((1, 0)),
    Slice(0, 1, 2),
    Concat(0),
    Stack(1),
    PermuteElements(0, (2, 3), (1, 0)),
    Adapt("rows", (3, 2)),
    Chain((Concat(0), Permute((1, 0)))),
]


@pytest.fixture
def mapping() -> KeyMapping:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    old = {"a": torch.zeros(4, 3), "b": torch.zeros(4), "left": torch.zeros(1)}
    question = Question("q1", "which?", (Option("this", (Match("1.bias", ("b",)),), 0.5),), ("1.bias",))
    return mapping_of(model, {"state_dict": old}, {"0.weight": "a", "0.bias": "b"}, questions=(question,))


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_mappings_as_written_are_valid_and_come_back(mapping, tmp_path):
    from dataclasses import replace

    first = replace(
        mapping.matches[0], alternatives=(Alternative(("left",), Slice(0, 0, 1), 0.02),), decided=True, score=0.5, confidence=0.875
    )
    mapping = replace(
        mapping, matches=(first, *mapping.matches[1:]), warnings=("careful",), verdict=Verdict("renamed", "the same", ("names",))
    )
    path = mapping.save(tmp_path / "m.json")
    VALIDATOR.validate(json.loads(path.read_text()))
    assert KeyMapping.load(path).to_dict() == mapping.to_dict()


def test_proposed_mappings_are_valid():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    mapping = propose_mapping(model, {f"module.{key}": value for key, value in model.state_dict().items()})
    VALIDATOR.validate(json.loads(json.dumps(mapping.to_dict())))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.op)
def test_every_transform_is_valid(mapping, transform):
    data = mapping.with_matches([Match("0.bias", ("b",), transform)]).to_dict()
    VALIDATOR.validate(json.loads(json.dumps(data)))
    assert KeyMapping.from_dict(data)["0.bias"].transform == transform


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"),
        (("version",), 2),
        (("matches", 0, "confidence"), 1.5),
        (("matches", 0, "sources"), "a"),
        (("matches", 0, "transform"), {"op": "invent"}),
        (("matches", 0, "transform"), {"op": "concat"}),
        (("matches", 0, "transform"), {"op": "concat", "dim": 0, "more": 1}),
    ],
)
def test_what_the_schema_refuses_the_reader_refuses(mapping, path, value):
    data = json.loads(json.dumps(mapping.to_dict()))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(MappingError):
        KeyMapping.from_dict(data)
