from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from handmade import assert_unchanged, mapping_of, snapshot_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import automatch
from automatch.composing import compose
from automatch.errors import LoadError, MappingError
from automatch.mapping import KeyMapping, Option, Question
from automatch.migrations import find_migration, migrations_folder
from automatch.specs import spec_of_model, spec_of_state_dict
from automatch.transforms import Concat, Permute, PermuteElements, Slice, Stack

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, names=("fc", "out")):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(3, 3))
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A class whose file lies in a folder of its own, and so can have migrations beside it."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "net_of_migrations.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path / "project"))
    sys.modules.pop("net_of_migrations", None)
    yield importlib.import_module("net_of_migrations").Net
    sys.modules.pop("net_of_migrations", None)


V1, V2, V3 = ("fc", "out"), ("layer", "head"), ("body", "classifier")


def step(net: Any, old: tuple[str, str], new: tuple[str, str]) -> KeyMapping:
    feeds = {f"{b}.{leaf}": f"{a}.{leaf}" for a, b in zip(old, new, strict=True) for leaf in ("weight", "bias")}
    return mapping_of(net(new), net(old).state_dict(), feeds, confidence=0.3)


def test_an_accepted_mapping_is_found_by_itself(net, tmp_path):
    old, new = net(V1), net(V2)
    path = automatch.accept(step(net, V1, V2), new)
    assert path.parent == tmp_path / "project" / "automatch_migrations" == migrations_folder(new)
    assert path.name == f"{spec_of_state_dict(old.state_dict()).fingerprint[7:19]}-{spec_of_model(new).fingerprint[7:19]}.json"
    report = automatch.load(new, {"state_dict": old.state_dict()})
    assert torch.equal(new.layer.weight, old.fc.weight)
    assert torch.equal(new.head.bias, old.out.bias)
    assert f"loaded through the reviewed migration {path.name}" in report.warnings
    assert automatch.load(nn.DataParallel(new).module, old.state_dict()).withheld == ()
    assert path == automatch.accept(step(net, V1, V2), new)


def test_chains_compose(net):
    first, second = automatch.accept(step(net, V1, V2), net(V2)), automatch.accept(step(net, V2, V3), net(V3))
    old, newest = net(V1), net(V3)
    report = automatch.load(newest, old.state_dict())
    assert torch.equal(newest.classifier.weight, old.out.weight)
    assert any(f"{first.name} → {second.name}" in text for text in report.warnings)
    assert all(match.decided for match in report.mapping.matches)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrapped_models_and_checkpoints_use_the_same_migrations(net, wrap):
    automatch.accept(step(net, V1, V2), net(V2))
    wrapped_mapping = mapping_of(
        wrap(net(V3)),
        net(V2).state_dict(),
        {
            next(key for key in wrap(net(V3)).state_dict() if key.endswith(match.target)): match.sources[0]
            for match in step(net, V2, V3).matches
        },
    )
    automatch.accept(wrapped_mapping, net(V3))
    old, plain = net(V1), net(V3)
    for model, inner, ckpt in (
        (wrap(plain), plain, old.state_dict()),
        (plain, plain, wrap(old).state_dict()),
        (wrap(plain), plain, wrap(old).state_dict()),
    ):
        nn.init.zeros_(inner.body.weight)
        report = automatch.load(model, ckpt)
        assert torch.equal(inner.body.weight, old.fc.weight)
        assert torch.equal(inner.classifier.bias, old.out.bias)
        assert any("reviewed migration" in text for text in report.warnings)


def test_a_class_derived_elsewhere_uses_the_migrations_of_its_base(net):
    automatch.accept(step(net, V1, V2), net(V2))

    class Derived(net):
        pass

    assert automatch.check(Derived(V2), net(V1).state_dict()).how == "migrated"
    assert migrations_folder(Derived(V2)) != migrations_folder(net(V2))


def test_a_stale_migration_is_an_error_that_changes_nothing(net):
    path = automatch.accept(step(net, V1, V2), net(V2))
    model, ckpt = net(V3), net(V1).state_dict()
    before = snapshot_of(model)
    with pytest.raises(MappingError, match=rf"stale migration: .*{path.name} begins at this.*'layer.weight' is not there.*mapping="):
        automatch.load(model, ckpt)
    assert_unchanged(model, before)
    automatch.load(model, ckpt, mapping=step(net, V1, V3), threshold=0.0)
    assert torch.equal(model.body.weight, ckpt["fc.weight"])


def test_todays_checkpoint_needs_no_migration(net):
    automatch.accept(step(net, V1, V2), net(V2))
    model = net(V1)
    same = net(V1)
    automatch.load(model, same.state_dict(), threshold=0.5)  # begins a migration, but to another version of the model
    assert torch.equal(model.fc.weight, same.fc.weight)
    assert find_migration([migrations_folder(model)], spec_of_model(net(V3)), spec_of_model(net(V3))) is None


def test_conflicting_migrations_are_an_error(net):
    crossed = step(net, V1, V3).decide("body.bias", "out.bias").decide("classifier.bias", "fc.bias")
    files = [automatch.accept(m, net(V3)).name for m in (step(net, V1, V2), step(net, V2, V3), crossed)]
    with pytest.raises(MappingError, match=r"conflicting migrations.*differ for 'body.bias'; delete the wrong one") as error:
        automatch.load(net(V3), net(V1).state_dict())
    assert all(name in str(error.value) for name in files)


def test_agreeing_ways_are_no_conflict_and_the_shortest_is_taken(net):
    for mapping in (step(net, V1, V2), step(net, V2, V3), step(net, V1, V3)):
        automatch.accept(mapping, net(V3))
    found = find_migration([migrations_folder(net(V3))], spec_of_state_dict(net(V1).state_dict()), spec_of_model(net(V3)))
    assert len(found.files) == 1


def test_what_cannot_be_accepted(net, tmp_path):
    mapping = step(net, V1, V2)
    question = Question("q7", "?", (Option("a", (mapping.matches[0],)),), (mapping.matches[0].target,))
    with pytest.raises(MappingError, match=r"questions are open \(q7\)"):
        automatch.accept(replace(mapping, questions=(question,)), net(V2))
    with pytest.raises(MappingError, match="without the keys of both sides"):
        automatch.accept(replace(mapping, target=replace(mapping.target, spec=None)), net(V2))
    with pytest.raises(MappingError, match="Linear has no source file of its own"):
        automatch.accept(mapping, nn.Linear(2, 2))
    path = automatch.accept(mapping, tmp_path / "elsewhere")
    before = path.read_bytes()
    other = mapping.decide("layer.bias", "out.bias")
    with pytest.raises(MappingError, match=r"holds another mapping.*overwrite=True"):
        automatch.accept(other, tmp_path / "elsewhere")
    assert path.read_bytes() == before
    automatch.accept(other, tmp_path / "elsewhere", overwrite=True)
    assert KeyMapping.load(path)["layer.bias"].sources == ("out.bias",)


def test_damaged_migrations_are_named(net):
    path = automatch.accept(step(net, V1, V2), net(V2))
    data = json.loads(path.read_text())
    del data["source"]["entries"]
    path.write_text(json.dumps(data))
    with pytest.raises(MappingError, match=rf"migration .*{path.name} does not hold the keys"):
        automatch.load(net(V2), net(V1).state_dict())
    path.write_text("{")
    with pytest.raises(MappingError, match=f"{path.name}.*is not JSON"):
        automatch.load(net(V2), net(V1).state_dict())


def test_a_partial_migration_still_refuses_under_strict(net):
    automatch.accept(step(net, V1, V2).decide("head.bias", None), net(V2))
    with pytest.raises(LoadError, match=r"'head.bias'"):
        automatch.load(net(V2), net(V1).state_dict())
    report = automatch.load(net(V2), net(V1).state_dict(), adapt={"head.bias": "keep"})
    assert report.to_train_keys == ("head.bias",)


def test_check_for_continuous_integration(net):
    reference = net(V1).state_dict()
    assert automatch.check(net(V1), reference)[:2] == (True, "direct")
    broken = automatch.check(net(V2), reference)
    assert broken[:2] == (False, "broken")
    assert "'fc.weight' is not there" in broken.text
    assert "automatch accept" in broken.text
    with torch.device("meta"):
        model = net(V2)
    path = automatch.accept(step(net, V1, V2), model)
    assert automatch.check(model, reference)[:2] == (True, "migrated")
    assert path.name in automatch.check(model, reference).text
    assert automatch.check(net(V3), reference).text.startswith("stale migration")
    automatch.accept(step(net, V1, V2).decide("head.bias", None), model, overwrite=True)
    assert "leaves 1 tensors of the model without values: 'head.bias'" in automatch.check(model, reference).text


# ---- composing --------------------------------------------------------------------------------------


def layers(first: dict[str, Any], second: dict[str, Any], ckpt: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], KeyMapping]:
    """What the two mappings give one after the other, and their composition."""
    middle = {key: torch.empty(0) for key in first}
    a = mapping_of(middle, ckpt, first)
    a = replace(a, target=replace(a.target, spec=None))
    between = a.apply(ckpt)
    one = mapping_of(between, ckpt, first)
    target = mapping_of({key: torch.empty(0) for key in second}, between, second)
    expected = replace(target, target=replace(target.target, spec=None)).apply(between)
    return expected, compose(one, mapping_of(expected, between, second))


QKV = {name: torch.arange(12.0).reshape(4, 3) + 100 * i for i, name in enumerate("qkv")}
TURN = PermuteElements(0, (2, 2), (1, 0))
HEADS = PermuteElements(0, (1, 2, 2), (0, 2, 1))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": "q"}, {"b": "a"}),
        ({"a": ("q", Permute((1, 0)))}, {"b": ("a", Permute((1, 0)))}),
        ({"a": ("q", Permute((1, 0)))}, {"b": ("a", Slice(0, 1, 2))}),
        ({"a": (("q", "k", "v"), Concat(0))}, {"b": ("a", Slice(0, 4, 4))}),
        ({"a": "q", "b": "k"}, {"c": (("b", "a"), Concat(1))}),
        ({"a": "q", "b": "k"}, {"c": (("b", "a"), Stack(0))}),
        ({"a": (("q", "k"), Concat(0)), "b": "v"}, {"c": (("a", "b"), Concat(0))}),
        ({"a": ("q", Slice(0, 0, 2)), "b": ("q", Slice(0, 2, 2))}, {"c": (("a", "b"), Concat(0))}),
        ({"a": ("q", Slice(0, 1, 1)), "b": ("q", Slice(0, 2, 2)), "d": "k"}, {"c": (("a", "b"), Concat(0))}),
        ({"a": ("q", Slice(0, 0, 2)), "b": ("q", Slice(0, 2, 2)), "d": "k"}, {"c": (("a", "b", "d"), Concat(0))}),
        ({"a": ("q", Permute((1, 0))), "b": ("k", Permute((1, 0)))}, {"c": (("a", "b"), Concat(1))}),
        ({"a": ("q", HEADS), "b": ("k", HEADS)}, {"c": (("a", "b"), Concat(0))}),
    ],
)
def test_a_composition_does_what_its_parts_do(first, second):
    expected, composed = layers(first, second, QKV)
    applied = composed.apply(QKV)
    assert applied.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(applied[key], value), key


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": ("q", TURN), "b": "k"}, {"c": (("a", "b"), Concat(0))}),
        ({"a": ("q", TURN), "b": ("k", TURN)}, {"c": (("a", "b"), Concat(0))}),
        ({"a": ("q", Slice(0, 0, 2)), "b": ("k", Slice(0, 2, 2))}, {"c": (("a", "b"), Concat(0))}),
        ({"a": ("q", Permute((1, 0))), "b": ("k", Permute((1, 0)))}, {"c": (("a", "b"), Stack(0))}),
    ],
)
def test_what_cannot_be_written_as_one_is_said(first, second):
    with pytest.raises(MappingError, match=r"two migrations do not compose for 'c': .*accept one from the oldest"):
        layers(first, second, QKV)


@settings(max_examples=40, deadline=None)
@given(st.permutations(list("qkv")), st.permutations(list("abc")), st.integers(1, 3))
def test_renames_and_fusions_compose_in_any_order(sources, names, fused):
    first = dict(zip(names, sources, strict=True))
    kept = list(first)
    second: dict[str, Any] = {"f": (tuple(kept[:fused]), Concat(0))} if fused > 1 else {"f": kept[0]}
    expected, composed = layers(first, second | {"rest": kept[-1]}, QKV)
    applied = composed.apply(QKV)
    assert all(torch.equal(applied[key], value) for key, value in expected.items())


def test_keys_that_the_first_mapping_does_not_feed_stay_missing():
    first = mapping_of({"a": QKV["q"], "b": QKV["k"]}, QKV, {"a": "q"})
    second = mapping_of({"c": QKV["q"], "d": QKV["k"]}, {"a": QKV["q"], "b": QKV["k"]}, {"c": "a", "d": "b"})
    composed = compose(first, second)
    assert composed.missing_keys == ("d",)
    assert composed.unexpected_keys == ("k", "v")
