"""Whatever the names are, an export renames every key as the mapping does, or is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from exports_zoo import AnyModel, Feeds, State, answer, mapping_of, state_of
from hypothesis import given
from hypothesis import strategies as st

from automatch.errors import MappingError
from automatch.export import KINDS
from automatch.mapping import KeyMapping

# Prefixes of one another, numbers in names, signs of regular expressions, and the names that exports use themselves.
NAMES = st.sampled_from(["a", "ab", "a_b", "layer1", "layer10", "layers", "module", "unused", "x+y", "m|n", "q$", "h[0]", "{i}", "@"])
PATHS = st.lists(NAMES, max_size=2).map(lambda names: "".join(f"{name}." for name in names))


@st.composite
def renamings(draw: st.DrawFn) -> Feeds:
    """Model key to checkpoint key: whole prefixes, lists with an offset or in another order, swaps, and keys that stay."""
    feeds: Feeds = {}
    for _ in range(draw(st.integers(1, 4))):
        old, new, leaf = draw(PATHS), draw(PATHS), draw(st.sampled_from(["weight", "bias"]))
        kind = draw(st.sampled_from(["prefix", "list", "swap", "same"]))
        if kind == "list":
            order = draw(st.permutations(range(draw(st.integers(1, 12)))))
            offset, inner = draw(st.integers(0, 2)), draw(PATHS)
            feeds |= {f"{new}{place + offset}.{leaf}": f"{old}{number}.{inner}{leaf}" for place, number in enumerate(order)}
        elif kind == "swap":
            feeds |= {f"{new}{leaf}": f"{old}{leaf}", f"{old}{leaf}": f"{new}{leaf}"}
        else:
            feeds |= {f"{new}{name}.{leaf}": f"{new if kind == 'same' else old}{name}.{leaf}" for name in draw(st.sets(NAMES, max_size=3))}
    return {new: old for old, new in {old: new for new, old in feeds.items()}.items()}


@st.composite
def mappings(draw: st.DrawFn) -> tuple[State, KeyMapping]:
    """A state_dict and its mapping, which may leave keys of it out."""
    feeds = draw(renamings())
    keys = draw(st.permutations(sorted({*feeds.values(), *(f"{path}extra" for path in draw(st.lists(PATHS, max_size=2)))})))
    state = state_of(dict.fromkeys(keys, (2,)))
    left_out = draw(st.sets(st.sampled_from(sorted(feeds)), max_size=2)) if len(feeds) > 3 else set()
    return state, mapping_of(state, {new: old for new, old in feeds.items() if new not in left_out})


def run(mapping: KeyMapping, kind: str) -> dict[str, Any]:
    """The names that the exported code defines; none where the export is refused."""
    try:
        code = mapping.export(kind)
    except MappingError:
        return {}
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compile(code, kind, "exec"), names)
    return names


def assert_equal(got: State, wanted: State) -> None:
    assert {key: tensor.tolist() for key, tensor in got.items()} == {key: tensor.tolist() for key, tensor in wanted.items()}


@given(mappings())
def test_the_script_gives_what_the_mapping_gives(drawn: tuple[State, KeyMapping]) -> None:
    state, mapping = drawn
    assert_equal(run(mapping, "script")["convert_checkpoint_keys"](state), answer(mapping, state))


@given(mappings())
def test_the_pre_hook_gives_what_the_mapping_gives(drawn: tuple[State, KeyMapping]) -> None:
    state, mapping = drawn
    names, wanted = run(mapping, "pre_hook"), answer(mapping, state)
    if names:
        for given_state in (dict(state), dict(wanted)):
            names["convert_before_loading"](given_state, "")
            assert_equal(given_state, wanted)


@given(mappings())
def test_revise_keys_renames_as_the_mapping_does(drawn: tuple[State, KeyMapping]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoints = pytest.importorskip("mmengine.runner.checkpoint", reason="mmengine is not installed", exc_type=ImportError)
    state, mapping = drawn
    names, wanted = run(mapping, "revise_keys"), answer(mapping, state)
    loaded: State = {}
    if names:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "load_state_dict", lambda _model, renamed, *_: loaded.update(renamed))
            checkpoints._load_checkpoint_to_model(AnyModel({}), {"state_dict": dict(state)}, False, None, names["revise_keys"])
        assert_equal({key: loaded[key] for key in wanted}, wanted)
        assert not loaded.keys() & mapping.missing_keys


@given(mappings(), st.sampled_from(["key_mapping", "weight_conversions"]))
def test_transformers_renames_as_the_mapping_does(drawn: tuple[State, KeyMapping], kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loading = pytest.importorskip("transformers.core_model_loading", reason="transformers 5 is not installed")
    state, mapping = drawn
    names = run(mapping, kind)
    if names:
        steps = names.get(kind)
        renamings = steps if isinstance(steps, list) else [loading.WeightRenaming(old, new) for old, new in steps.items()]
        renamed = {loading.apply_renamings(key, renamings): tensor for key, tensor in state.items()}
        wanted = answer(mapping, state)
        assert_equal({key: renamed[key] for key in wanted}, wanted)


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == {"script", "pre_hook", "on_load_checkpoint", "revise_keys", "key_mapping", "weight_conversions"}
