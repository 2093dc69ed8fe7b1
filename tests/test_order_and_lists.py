"""Sorted files, modules that stay whole, lists that run one way, and what nobody can know."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from automatch import StateSpec, TensorSpec, propose_mapping
from automatch.engine import match_specs
from automatch.engine.registration import Precedence, restored
from automatch.engine.tables import current
from automatch.mapping import CONFIDENT
from automatch.transforms import apply_transform

CORPUS = Path(__file__).parent.parent / "benchmarks" / "corpus" / "cases"
Shapes = dict[str, tuple[int, ...]]


def spec(shapes: Shapes, origin: str = "model") -> StateSpec:
    kind: Any = "parameter" if origin == "model" else None
    return StateSpec(tuple(TensorSpec(key, shape, "float32", kind) for key, shape in shapes.items()), origin)


def sources(model: Shapes, ckpt: Shapes) -> dict[str, str]:
    return {m.target: m.sources[0] for m in propose_mapping(spec(model), spec(ckpt, "checkpoint")).matches}


def case_specs(case: dict[str, Any], *, sort: bool = False) -> tuple[StateSpec, StateSpec]:
    entries = sorted(case["source"]["entries"]) if sort else case["source"]["entries"]
    kinds: Any = {"param": "parameter", "buffer": "buffer", "tensor": None}
    source = StateSpec(tuple(TensorSpec(k, tuple(shape), d, None) for k, shape, d, _ in entries), "checkpoint")
    target = StateSpec(tuple(TensorSpec(k, tuple(shape), d, kinds[kind]) for k, shape, d, kind in case["target"]["entries"]), "model")
    return source, target


def load_case(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((CORPUS / f"{name}.json.gz").read_bytes()))


# ---- the order of registration ---------------------------------------------------------------------------------


SIBLINGS = ("conv1", "bn1", "conv2", "bn2", "norm", "attn", "mlp", "weight", "bias", "x7", "7", "10")


@given(st.lists(st.sampled_from(SIBLINGS), min_size=1, unique=True))
def test_a_restored_order_holds_every_sibling_once_and_lower_numbers_first(siblings: list[str]) -> None:
    order, known = restored(sorted(siblings), current().precedence)
    assert sorted(order) == sorted(siblings)
    assert 0.0 <= known <= 1.0
    for first, second in (("conv1", "conv2"), ("bn1", "bn2"), ("7", "10")):
        if {first, second} <= set(siblings) and len(siblings) == 2:
            assert order == [first, second]


def test_siblings_nobody_has_seen_are_left_to_the_alphabet_and_said_to_be_unknown() -> None:
    assert restored(["zeta", "alpha", "mid"], Precedence()) == (["alpha", "mid", "zeta"], 0.0)


def test_the_model_shows_the_order_of_the_names_it_shares_with_a_sorted_file() -> None:
    own = Precedence().with_order_of(["block.zeta.weight", "block.alpha.weight"])
    assert restored(["alpha", "zeta"], own)[0] == ["zeta", "alpha"]


@pytest.mark.parametrize(
    "name", ["timm-convnext_tiny-to-tv-convnext_tiny", "tv-mobilenet_v2-to-timm-mobilenetv2_100", "hf-gpt2-to-nanogpt"]
)
def test_a_sorted_file_gives_the_pairs_of_the_unsorted_one(name: str) -> None:
    case = load_case(name)
    plain, in_order = (match_specs(*case_specs(case, sort=sort), {}) for sort in (False, True))
    assert {m.target: m.sources for m in plain.matches} == {m.target: m.sources for m in in_order.matches}


@pytest.mark.parametrize("name", ["bert-gamma-beta-to-hf-seqcls", "timm-mobilenetv1_100-to-hf-mobilenet_v1", "hf-gpt2-to-flashattn"])
def test_repeated_modules_solved_once_give_what_solving_all_of_them_gives(name: str) -> None:
    source, target = case_specs(load_case(name))
    few, every = (match_specs(source, target, {}, exhaustive=exhaustive) for exhaustive in (False, True))
    assert {m.target: (m.sources, m.transform) for m in few.matches} == {m.target: (m.sources, m.transform) for m in every.matches}


# ---- modules stay whole ------------------------------------------------------------------------------------------

BODY: Shapes = {f"body.{i}.{leaf}": shape for i in range(4) for leaf, shape in (("weight", (16, 16)), ("bias", (16,)))}


def test_the_bias_of_a_head_with_another_input_is_not_fed() -> None:
    found = sources({**BODY, "head.weight": (3, 16), "head.bias": (3,)}, {**BODY, "head.weight": (3, 24), "head.bias": (3,)})
    assert "head.bias" not in found
    assert found["body.3.bias"] == "body.3.bias"


def test_the_bias_of_a_convolution_with_another_kernel_is_fed() -> None:
    found = sources({**BODY, "head.weight": (3, 16, 1, 1), "head.bias": (3,)}, {**BODY, "head.weight": (3, 16, 3, 3), "head.bias": (3,)})
    assert found["head.bias"] == "head.bias"


def test_a_module_inserted_in_a_numbered_list_does_not_take_the_bias_of_the_next() -> None:
    model = {**BODY, "stem.1.weight": (16,), "stem.1.bias": (16,), "stem.2.weight": (16, 48), "stem.2.bias": (16,)}
    found = sources(model, {**BODY, "stem.1.weight": (16, 48), "stem.1.bias": (16,)})
    assert (found["stem.2.weight"], found["stem.2.bias"]) == ("stem.1.weight", "stem.1.bias")


def test_a_pooler_is_not_the_transform_before_the_words() -> None:
    body = {**BODY, "embeddings.weight": (50, 16)}
    found = sources({**body, "pooler.dense.weight": (16, 16)}, {**body, "cls.predictions.transform.dense.weight": (16, 16)})
    assert "pooler.dense.weight" not in found


def test_names_that_tensorflow_made_unique_are_a_list() -> None:
    def block(names: tuple[str, str, str]) -> Shapes:
        return {f"{name}/{leaf}": shape for name in names for leaf, shape in (("weight", (8, 8)), ("bias", (8,)))}

    found = sources(block(("first_1", "first_2", "first_3")), block(("dense", "dense_1", "dense_2")))
    assert [found[f"first_{i}/weight"] for i in (1, 2, 3)] == ["dense/weight", "dense_1/weight", "dense_2/weight"]


# ---- lists -------------------------------------------------------------------------------------------------------


def stages(name: str, widths: tuple[int, ...]) -> Shapes:
    return {
        f"{name}.{i}.{layer}.{leaf}": shape
        for i, width in enumerate(widths)
        for layer in ("conv1", "conv2")
        for leaf, shape in (("weight", (width, width, 3, 3)), ("bias", (width,)))
    }


def test_stages_of_one_width_follow_the_direction_that_the_others_show() -> None:
    found = sources(stages("decoder.up_blocks", (64, 64, 32, 16)), stages("decoder.up", (16, 32, 64, 64)))
    assert [found[f"decoder.up_blocks.{i}.conv1.weight"] for i in range(4)] == [f"decoder.up.{3 - i}.conv1.weight" for i in range(4)]


def test_a_shorter_stack_is_asked_about_and_not_loaded_by_itself() -> None:
    mapping = propose_mapping(spec(stages("student.layer", (16,) * 3)), spec(stages("encoder.layer", (16,) * 6), "checkpoint"))
    (question,) = mapping.questions
    assert [option.label for option in question.options][:2] == ["the first 3", "the last 3"]
    assert all(match.confidence < CONFIDENT for match in mapping.matches)
    answered = mapping.answer(question.id, "every other, from the first")
    assert {m.sources[0].split(".")[2] for m in answered.matches} == {"0", "2", "4"}
    assert all(match.confidence >= CONFIDENT for match in answered.matches)


# ---- several targets, padded rows, crowds -------------------------------------------------------------------------


def test_a_padded_vocabulary_gives_its_first_rows_and_is_never_sure() -> None:
    model, ckpt = {**BODY, "wte.weight": (1000, 16)}, {**BODY, "word_embeddings.weight": (1024, 16)}
    match = propose_mapping(spec(model), spec(ckpt, "checkpoint")).get("wte.weight")
    assert match is not None
    assert match.transform.op == "slice"
    assert match.confidence < CONFIDENT


def test_thousands_of_tensors_of_one_shape_with_meaningless_names_stay_alone() -> None:
    generator = torch.Generator().manual_seed(0)

    def names(count: int) -> Shapes:
        letters = torch.randint(97, 123, (count, 12), generator=generator).tolist()
        return {"".join(map(chr, row[:6])) + "." + "".join(map(chr, row[6:])): (4, 4) for row in letters}

    result = match_specs(spec(names(2_000), "checkpoint"), spec(names(2_000)), {})
    assert not result.matches
    assert result.verdict.kind == "different"


def test_an_ordinary_model_still_loads_by_names_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    mapping = propose_mapping(model, {f"net.{key}": value for key, value in model.state_dict().items()})
    assert all(match.confidence >= CONFIDENT for match in mapping.matches)


# ---- fused rows --------------------------------------------------------------------------------------------------


def test_rows_interleaved_by_head_are_never_copied_in_turn_without_asking() -> None:
    model = {**BODY, "h.0.attn.Wqkv.weight": (384, 128), "h.0.attn.Wqkv.bias": (384,)}
    ckpt = {**BODY, "layers.0.attention.query_key_value.weight": (384, 128), "layers.0.attention.query_key_value.bias": (384,)}
    mapping = propose_mapping(spec(model), spec(ckpt, "checkpoint"))
    rows = [match for match in mapping.matches if "Wqkv" in match.target]
    assert len(rows) == 2
    assert all(match.confidence < CONFIDENT for match in rows)
    (question,) = [q for q in mapping.questions if "h.0.attn.Wqkv.weight" in q.keys]
    assert question.options[0].label == "interleaved, head size 64"
    assert any("rows" in warning for warning in mapping.warnings)
    by_head = torch.arange(384.0)
    answered = mapping.answer(question.id, "interleaved, head size 64").get("h.0.attn.Wqkv.bias")
    assert answered is not None
    expected = by_head.reshape(2, 3, 64).permute(1, 0, 2).reshape(384)
    assert torch.equal(apply_transform(answered.transform, [by_head]), expected)
