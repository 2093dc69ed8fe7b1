"""What only the order of registration tells apart, what layers of one library have in common, and problems nobody could match."""

from __future__ import annotations

import gc
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from automatch import StateSpec, TensorSpec, propose_mapping
from automatch.errors import CheckpointError
from automatch.mapping import CONFIDENT
from automatch.transforms import apply_transform

EXTRA = Path(__file__).parent.parent / "benchmarks" / "corpus_extra" / "cases"
Shapes = dict[str, tuple[int, ...]]


def spec(shapes: Shapes, origin: str = "model") -> StateSpec:
    kind: Any = "parameter" if origin == "model" else None
    return StateSpec(tuple(TensorSpec(key, shape, "float32", kind) for key, shape in shapes.items()), origin)


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


OLD: Shapes = {
    **linear("quux.0", 48, 12), **linear("quux.2", 48, 48), **linear("quux.4", 1, 48),
    **linear("zorb.0", 48, 12), **linear("zorb.2", 48, 48), **linear("zorb.4", 5, 48),
}  # fmt: skip
NEW: Shapes = {
    **linear("trunk.left.0", 48, 12), **linear("trunk.left.2", 48, 48), **linear("trunk.right.0", 48, 12),
    **linear("trunk.right.2", 48, 48), **linear("end_left", 5, 48), **linear("end_right", 1, 48),
}  # fmt: skip


def test_twins_in_an_order_that_other_pairs_contradict_are_one_question() -> None:
    mapping = propose_mapping(spec(NEW), spec(OLD, "checkpoint"))
    assert mapping["end_left.weight"].sources == ("zorb.4.weight",)
    assert all(mapping[key].confidence < CONFIDENT for key in NEW if key.startswith("trunk."))
    (question,) = mapping.questions
    assert set(question.keys) == {key for key in NEW if key.startswith("trunk.")}
    found = [{m.target: m.sources[0] for m in option.matches} for option in question.options]
    assert {frozenset(option.items()) for option in found} == {
        frozenset((key, key.replace("trunk.left", one).replace("trunk.right", two)) for key in question.keys)
        for one, two in (("quux", "zorb"), ("zorb", "quux"))
    }


def test_twins_that_are_numbered_are_no_question() -> None:
    model = {**linear("a.1", 48, 48), **linear("a.2", 48, 48), **linear("x", 7, 48), **linear("y", 9, 48)}
    ckpt = {**linear("y", 9, 48), **linear("x", 7, 48), **linear("b.0", 48, 48), **linear("b.1", 48, 48)}
    mapping = propose_mapping(spec(model), spec(ckpt, "checkpoint"))
    assert mapping["a.1.weight"].sources == ("b.0.weight",)
    assert mapping.questions == ()


def test_an_exchange_never_swaps_a_weight_for_a_bias() -> None:
    norms = {f"block.{i}.{name}.{leaf}": (32,) for i in range(3) for name in ("p", "q") for leaf in ("weight", "bias")}
    other = {key.replace(".q.", ".first.").replace(".p.", ".second."): shape for key, shape in norms.items()}
    for question in propose_mapping(spec(norms), spec(other, "checkpoint")).questions:
        for option in question.options:
            assert all(m.target.rpartition(".")[2] == m.sources[0].rpartition(".")[2] for m in option.matches)


@pytest.mark.parametrize("per_head", ["checkpoint", "model"])
def test_heads_as_an_axis_before_the_inputs(per_head: str) -> None:
    heads, size, width = 4, 6, 40
    flat = {f"layers.{i}.attn.{n}_proj.weight": (heads * size, width) for i in range(3) for n in "qkv"}
    own = {f"blocks.{i}.attn.W_{n.upper()}": (heads, width, size) for i in range(3) for n in "qkv"}
    model, ckpt = (flat, own) if per_head == "checkpoint" else (own, flat)
    mapping = propose_mapping(spec(model), spec(ckpt, "checkpoint"))
    target, source = ("layers.1.attn.k_proj.weight", "blocks.1.attn.W_K")[:: 1 if per_head == "checkpoint" else -1]
    match = mapping[target]
    assert match.sources == (source,)
    matrix = torch.randn(heads * size, width)
    by_head = matrix.reshape(heads, size, width).transpose(1, 2)  # what `x @ W[head]` needs for the same outputs
    given, wanted = (by_head, matrix) if per_head == "checkpoint" else (matrix, by_head)
    torch.testing.assert_close(apply_transform(match.transform, [given]), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["neg-hf-pegasus-to-xglm", "neg-timm-rexnet-to-ghostnet"])
def test_layers_and_norms_alike_in_two_models_prove_nothing(name: str) -> None:
    case = json.loads(gzip.decompress((EXTRA / f"{name}.json.gz").read_bytes()))
    source, target = ({key: tuple(shape) for key, shape, *_ in case[side]["entries"]} for side in ("source", "target"))
    mapping = propose_mapping(spec(target), spec(source, "checkpoint"))
    assert [match for match in mapping.matches if match.confidence >= CONFIDENT] == []


def test_a_crowd_of_one_shape_ends() -> None:
    names = [f"{a}.{b}.{leaf}" for a in range(70) for b in ("conv", "norm", "attn", "proj") for leaf in ("weight", "bias")]
    model, ckpt = {f"model.{name}": (2, 2) for name in names}, {f"old.{name.replace('attn', 'self')}": (2, 2) for name in names}
    assert len(propose_mapping(spec(model), spec(ckpt, "checkpoint")).matches) <= len(model)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        propose_mapping(spec(NEW), spec(OLD, "checkpoint"))
        assert gc.isenabled() == enabled
        with pytest.raises(CheckpointError):
            propose_mapping(spec(NEW), {"a": object()})
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_modules_written_into_one_segment_are_taken_apart_at_the_numbers() -> None:
    parts = {"conv/kernel": (3, 3, 16, 16), "conv/bias": (16,), "bn/gamma": (16,), "bn/beta": (16,), "bn/moving_mean": (16,)}
    flat = {f"conv{s}_block{b}_{k}_{part}": shape for s in (2, 3) for b in (1, 2) for k in (1, 2) for part, shape in parts.items()}
    names = {"kernel": "weight", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "bias": "bias"}
    wanted = {}
    for key in flat:
        stage, block, rest = key.split("_", 2)
        index, leaf = rest.split("_", 1)
        module, entry = leaf.split("/")
        wanted[f"layer{int(stage[4:]) - 1}.{int(block[5:]) - 1}.{module}{index}.{names[entry]}"] = key
    model = {key: (16, 16, 3, 3) if len(flat[source]) == 4 else flat[source] for key, source in wanted.items()}
    mapping = propose_mapping(spec(model), spec(flat, "checkpoint"))
    assert {match.target: match.sources[0] for match in mapping.matches} == wanted
