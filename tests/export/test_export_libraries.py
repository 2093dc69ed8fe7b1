"""The exports for mmengine and transformers, run by mmengine and transformers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_zoo import AnyModel, State, answer, converted, mapping_of, register, renamed, state_of
from safetensors.torch import save_file

from automatch.errors import MappingError
from automatch.mapping import Side
from automatch.specs import StateSpec, TensorSpec


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "exported", "exec"), names)
    return names


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def assert_loaded(model: torch.nn.Module, wanted: State) -> None:
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.fixture
def load_checkpoint() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("mmengine.runner.checkpoint", reason="mmengine is not installed", exc_type=ImportError).load_checkpoint


def test_mmengine_loads_with_revise_keys(tmp_path: Path, load_checkpoint: Any) -> None:
    state, feeds = renamed()
    mapping = mapping_of(state, feeds)
    wanted = answer(mapping, state)
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    revise_keys = run(mapping.export("revise_keys"))["revise_keys"]
    model = AnyModel(shapes_of(wanted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_checkpoint(model, str(tmp_path / "old.pth"), map_location="cpu", strict=False, revise_keys=revise_keys)
    assert_loaded(model, wanted)


@pytest.fixture
def any_model() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")

    class AnyConfig(transformers.PretrainedConfig):
        model_type = "automatch-any"

        def __init__(self, shapes: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
            self.shapes = shapes or {}
            super().__init__(**kwargs)

    class AnyPreTrained(transformers.PreTrainedModel):
        config_class = AnyConfig

        def __init__(self, config: AnyConfig) -> None:
            super().__init__(config)
            register(self, config.shapes)
            self.post_init()

        def _init_weights(self, module: torch.nn.Module) -> None:
            pass

    def save(folder: Path, state: State, wanted: State) -> type[AnyPreTrained]:
        AnyConfig(shapes_of(wanted)).save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return AnyPreTrained

    return save


def test_transformers_loads_with_key_mapping(tmp_path: Path, any_model: Any) -> None:
    state, feeds = renamed()
    mapping = mapping_of(state, feeds)
    wanted = answer(mapping, state)
    key_mapping = run(mapping.export("key_mapping"))["key_mapping"]
    model, report = any_model(tmp_path, state, wanted).from_pretrained(tmp_path, key_mapping=key_mapping, output_loading_info=True)
    assert_loaded(model, wanted)
    assert not report["missing_keys"]


@pytest.mark.parametrize("make", [renamed, converted])
def test_transformers_loads_with_weight_conversions(tmp_path: Path, any_model: Any, make: Any) -> None:
    state, feeds = make()
    mapping = mapping_of(state, feeds)
    wanted = answer(mapping, state)
    model_class = any_model(tmp_path, state, wanted)
    code = mapping.export("weight_conversions")
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    register_checkpoint_conversion_mapping("AnyPreTrained", run(code)["weight_conversions"], overwrite=True)
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_loaded(model, wanted)
    assert not report["missing_keys"]


def test_weight_conversions_use_the_librarys_own_operations_where_they_fit() -> None:
    state, feeds = converted()
    code = mapping_of(state, feeds).export("weight_conversions")
    for operation in ("Concatenate(dim=0)", "Chunk(dim=0)", "MergeModulelist(dim=0)", "Transpose(0, 1)"):
        assert f"operations=[{operation}]" in code


@pytest.mark.parametrize("kind", ["revise_keys", "key_mapping"])
def test_more_than_a_new_name_is_refused(kind: str) -> None:
    state, feeds = converted()
    with pytest.raises(MappingError, match=f"{kind} only renames, and '.*' needs concat of 3 source"):
        mapping_of(state, {key: feed for key, feed in feeds.items() if "qkv" in key}).export(kind)
    with pytest.raises(MappingError, match=f"{kind} only renames, and 'tok.weight' feeds both 'embed.weight' and 'lm_head.weight'"):
        mapping_of(state, {"embed.weight": "tok.weight", "lm_head.weight": "tok.weight"}).export(kind)


@pytest.mark.parametrize("kind", ["key_mapping", "weight_conversions"])
@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("conv.weight_g", "net.weight_g", "cannot make 'net.weight_g', an old name that transformers changes by itself"),
        ("conv.g", "conv(1).g", "'conv(1).g' holds a sign that transformers reads as a regular expression"),
        ("conv*.g", "conv.g", "'conv*.g' holds a sign that transformers reads as a regular expression"),
    ],
)
def test_names_that_transformers_cannot_load_are_refused(kind: str, old: str, new: str, why: str) -> None:
    with pytest.raises(MappingError, match=re.escape(why)):
        mapping_of({old: torch.ones(2)}, {new: old}).export(kind)


def test_mmengine_is_never_given_an_empty_list() -> None:
    """Its loop over the expressions makes an OrderedDict of a plain one, which it needs afterwards."""
    keys = ["a.weight", "b.bias", "c.d.scale"]
    mapping = mapping_of(state_of(dict.fromkeys(keys, (2,))), dict(zip(keys, keys, strict=True)))
    assert run(mapping.export("revise_keys"))["revise_keys"] == [("^", "")]


def test_an_unused_key_with_the_name_of_a_model_key_is_set_aside_or_refused() -> None:
    mapping = mapping_of({"old.weight": torch.ones(2), "head.weight": torch.ones(2)}, {"head.weight": "old.weight"})
    assert (r"^head\.weight$", "@unused.head.weight") in run(mapping.export("revise_keys"))["revise_keys"]
    for kind in ("key_mapping", "weight_conversions"):
        with pytest.raises(MappingError, match=f"{kind} cannot leave 'head.weight' of the checkpoint out"):
            mapping.export(kind)


def test_a_tied_key_needs_no_renaming_of_its_own() -> None:
    mapping = mapping_of({"tok.weight": torch.ones(2)}, {"embed.weight": "tok.weight", "head.weight": "tok.weight"})
    tied = StateSpec((TensorSpec("embed.weight", (2,)), TensorSpec("head.weight", (2,), alias_of="embed.weight")), "Tied")
    mapping = type(mapping)(mapping.source, Side.of(tied), mapping.matches)
    assert run(mapping.export("revise_keys"))["revise_keys"] == [(r"^tok\.weight$", "embed.weight")]
    assert "WeightConverter" not in mapping.export("weight_conversions")
