"""What must hold for any model: Hypothesis looks for the one that breaks it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import ZOO

from automatch import KeyMapping, StateSpec, TensorSpec, propose_mapping
from automatch.specs import spec_of_model
from automatch.transforms import Copy

WORDS = ("encoder", "decoder", "layers", "blocks", "attn", "mlp", "norm", "proj", "fc", "conv")
LEAVES = (("weight", (4, 4)), ("weight", (4, 6)), ("bias", (4,)), ("weight", (4,)), ("running_mean", (4,)), ("num_batches_tracked", ()))
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "net.", "ema.")

segments = st.one_of(st.sampled_from(WORDS), st.integers(0, 12).map(str))


@st.composite
def specs(draw: st.DrawFn, max_size: int = 24) -> StateSpec:
    """State dicts of up to ``max_size`` entries with realistic words, few shapes, and so many near-equals."""
    paths = draw(st.lists(st.lists(segments, min_size=1, max_size=4).map(".".join), min_size=1, max_size=max_size // 2, unique=True))
    entries: dict[str, tuple[int, ...]] = {}
    for path in paths:
        for leaf, shape in draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3)):
            entries.setdefault(f"{path}.{leaf}", shape)
    return StateSpec(tuple(TensorSpec(key, shape) for key, shape in entries.items()), "drawn")


def renamed(spec: StateSpec, prefix: str) -> StateSpec:
    return StateSpec(tuple(TensorSpec(prefix + t.key, t.shape, t.dtype) for t in spec), "prefixed")


def shuffled(spec: StateSpec, seed: int) -> StateSpec:
    tensors = list(spec.tensors)
    random.Random(seed).shuffle(tensors)
    return StateSpec(tuple(tensors), spec.origin)


def assert_identity(mapping: KeyMapping, spec: StateSpec, *, prefix: str = "") -> None:
    assert {m.target: m.sources for m in mapping.matches} == {key: (prefix + key,) for key in spec.keys}
    assert all(m.transform == Copy() for m in mapping.matches)
    assert not mapping.questions


@pytest.mark.parametrize("name", ZOO)
def test_a_model_maps_onto_itself_with_certainty(name: str) -> None:
    model = ZOO[name]()
    mapping = propose_mapping(model, model.state_dict())
    assert_identity(mapping, spec_of_model(model))
    assert min(m.confidence for m in mapping.matches) >= 0.99


@given(specs())
def test_any_state_dict_maps_onto_itself_with_certainty(spec: StateSpec) -> None:
    mapping = propose_mapping(spec, spec)
    assert_identity(mapping, spec)
    assert min(m.confidence for m in mapping.matches) >= 0.99


@given(specs(), st.integers(0, 99), st.booleans())
def test_the_order_of_keys_does_not_change_a_self_mapping(spec: StateSpec, seed: int, on_the_model: bool) -> None:
    other = shuffled(spec, seed)
    source, target = (spec, other) if on_the_model else (other, spec)
    assert_identity(propose_mapping(target, source), spec)


@given(specs(), st.lists(st.sampled_from(WRAPPERS), min_size=1, max_size=3).map("".join), st.integers(0, 99))
def test_an_injected_prefix_is_undone(spec: StateSpec, prefix: str, seed: int) -> None:
    for source in (renamed(spec, prefix), shuffled(renamed(spec, prefix), seed)):
        mapping = propose_mapping(spec, source)
        assert_identity(mapping, spec, prefix=prefix)
        assert min(m.confidence for m in mapping.matches) >= 0.95


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_around_a_real_model_costs_nothing(name: str, wrapper: str) -> None:
    model = ZOO[name]()
    wrapped = {wrapper + key: value for key, value in model.state_dict().items()}
    mapping = propose_mapping(model, wrapped)
    assert_identity(mapping, spec_of_model(model), prefix=wrapper)


@given(specs(), specs())
def test_every_key_is_used_once_and_every_key_is_accounted_for(target: StateSpec, source: StateSpec) -> None:
    mapping = propose_mapping(target, source)
    used = Counter(key for m in mapping.matches if m.transform == Copy() for key in m.sources)
    assert all(count == 1 for count in used.values())
    assert [m.target for m in mapping.matches] == [key for key in target.keys if key in mapping]
    assert {*mapping.missing_keys} == {*target.keys} - {m.target for m in mapping.matches}
    assert {*mapping.unexpected_keys} == {*source.keys} - {key for m in mapping.matches for key in m.sources}
    assert all(0 <= m.confidence <= 1 for m in mapping.matches)


@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_one_to_one_holds_where_nothing_tells_keys_apart(n_source: int, n_target: int, same_words: bool) -> None:
    source = StateSpec(tuple(TensorSpec(f"x{i}", (4, 4)) for i in range(n_source)))
    target = StateSpec(tuple(TensorSpec(f"{'x' if same_words else 'y'}{chr(97 + i)}", (4, 4)) for i in range(n_target)))
    mapping = propose_mapping(target, source)
    fed = [key for m in mapping.matches for key in m.sources]
    assert len(fed) == len(set(fed))


@given(specs(), specs())
def test_the_same_input_gives_the_same_answer(target: StateSpec, source: StateSpec) -> None:
    assert propose_mapping(target, source).to_dict() == propose_mapping(target, source).to_dict()


@given(specs(), specs(), st.data())
def test_a_pin_is_obeyed_whatever_else_is_there(target: StateSpec, source: StateSpec, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(target.keys))
    fitting = [t.key for t in source if t.shape == target[key].shape]
    pin = data.draw(st.sampled_from([None, *fitting]))
    mapping = propose_mapping(target, source, pins={key: pin})
    assert (mapping[key].sources if key in mapping else None) == (None if pin is None else (pin,))


def test_unrelated_models_are_not_confidently_matched() -> None:
    mapping = propose_mapping(nn.LSTM(4, 6, num_layers=2), ZOO["convnet"]().state_dict())
    assert not mapping.confident().matches
