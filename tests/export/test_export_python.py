"""The script, the pre-hook and the Lightning override do in PyTorch and Lightning what the mapping says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_zoo import AnyModel, State, answer, converted, mapping_of, renamed
from hypothesis import given
from hypothesis import strategies as st

from automatch.errors import MappingError
from automatch.export import KINDS
from automatch.transforms import Adapt


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compile(code, "exported", "exec"), names)
    return names


def assert_equal(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("make", [renamed, converted])
def test_the_script_makes_the_models_state_dict(make: Any) -> None:
    state, feeds = make()
    mapping = mapping_of(state, feeds)
    before = dict(state)
    made = run(mapping.export("script"))["convert_checkpoint_keys"](state)
    assert_equal(made, answer(mapping, state))
    assert state == before


def test_the_script_runs_without_automatch(tmp_path: Path) -> None:
    state, feeds = converted()
    mapping = mapping_of(state, feeds)
    mapping.export("script", tmp_path / "convert.py")
    torch.save({"state_dict": state}, tmp_path / "old.ckpt")
    guard = "import sys; sys.modules['automatch'] = None; import runpy; sys.argv = ['convert.py', 'old.ckpt', 'new.pt']; "
    done = subprocess.run(
        [sys.executable, "-c", guard + "runpy.run_path('convert.py', run_name='__main__')"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_equal(torch.load(tmp_path / "new.pt", weights_only=True), answer(mapping, state))


def test_keys_that_no_rule_knows_are_kept_and_known_leftovers_are_not() -> None:
    mapping = mapping_of({"a.weight": torch.ones(1), "a.inv_freq": torch.ones(1)}, {"b.weight": "a.weight"})
    convert = run(mapping.export("script"))["convert_checkpoint_keys"]
    assert convert({"a.weight": 1, "a.inv_freq": 2, "new.scale": 3}) == {"b.weight": 1, "new.scale": 3}


def test_the_pre_hook_lets_old_and_new_state_dicts_load() -> None:
    state, feeds = converted()
    mapping = mapping_of(state, feeds)
    wanted = answer(mapping, state)
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    model = AnyModel(shapes)
    outer = torch.nn.ModuleDict({"inner": AnyModel(shapes)})
    accept = run(mapping.export("pre_hook"))["accept_old_checkpoints"]
    accept(model), accept(outer["inner"])
    model.load_state_dict(state)
    assert_equal(model.state_dict(), wanted)
    model.load_state_dict(wanted)
    assert_equal(model.state_dict(), wanted)
    outer.load_state_dict({f"inner.{key}": tensor for key, tensor in state.items()})
    assert_equal(outer["inner"].state_dict(), wanted)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        model.load_state_dict({**state, "extra": torch.ones(4)})


def test_the_lightning_override_loads_an_old_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    state, feeds = converted()
    mapping = mapping_of(state, feeds)
    wanted = answer(mapping, state)
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    mixin = run(mapping.export("on_load_checkpoint"))["AcceptOldCheckpoints"]

    class Module(mixin, lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            from exports_zoo import register

            register(self, shapes)

    for held in (state, wanted):
        torch.save({"state_dict": held, "pytorch-lightning_version": lightning.__version__, "hyper_parameters": {}}, tmp_path / "old.ckpt")
        model = Module.load_from_checkpoint(tmp_path / "old.ckpt", map_location="cpu")
        assert_equal(model.state_dict(), wanted)


def test_a_hook_that_could_not_tell_old_from_new_is_refused() -> None:
    mapping = mapping_of({"a": torch.ones(1), "b": torch.ones(1)}, {"a": "b", "b": "a"})
    for kind in ("pre_hook", "on_load_checkpoint"):
        with pytest.raises(MappingError, match="have the same keys, so a hook cannot tell"):
            mapping.export(kind)
    assert run(mapping.export("script"))["convert_checkpoint_keys"]({"a": 1, "b": 2}) == {"a": 2, "b": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_what_invents_values_is_refused(kind: str) -> None:
    mapping = mapping_of({"a": torch.ones(2)}, {"b": "a"})
    match = mapping.matches[0]
    adapted = mapping.with_matches([type(match)(match.target, match.sources, Adapt("crop", (1,)))])
    with pytest.raises(MappingError, match=r"'b' is adapted \(crop\), which an export cannot do"):
        adapted.export(kind)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(MappingError, match="no export kind 'yaml'; there are: script, revise_keys"):
        mapping_of({"a": torch.ones(1)}, {"b": "a"}).export("yaml")


def test_doubt_is_written_above_the_rule() -> None:
    mapping = mapping_of({"a": torch.ones(1)}, {"b": "a"})
    match = mapping.matches[0]
    unsure = mapping.with_matches([type(match)(match.target, match.sources, confidence=0.4)])
    text = unsure.export("script")
    assert "# 1 of the matches have a confidence below 0.95: review them before you rely on this." in text
    assert "# 1 key; confidence 0.40, check it: a → b" in text


hostile = st.text(st.sampled_from("ab.01{}\"'\\\n\r#*()[]$^+@\u2028\x00é"), min_size=1, max_size=8)


@given(st.lists(hostile, unique=True, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_hostile_keys_stay_text(keys: list[str], chance: Any) -> None:
    state = {key: torch.full((1,), float(place)) for place, key in enumerate(keys)}
    others = [key + "x" for key in keys]
    chance.shuffle(others)
    mapping = mapping_of(state, dict(zip(others, keys, strict=True)))
    assert_equal(run(mapping.export("script"))["convert_checkpoint_keys"](state), answer(mapping, state))
    for kind in KINDS:
        try:
            compile(mapping.export(kind), kind, "exec")
        except MappingError:
            continue
