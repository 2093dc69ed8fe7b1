"""What follows the matches: optimizer state in its several forms, objects, tied weights; and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_models import New, Old, mapping_of, matches, new_model, old_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict
from worlds import save_alone

from automatch.distributed import MappedLoadPlanner, load
from automatch.errors import LoadError, MappingError, ModelError
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import spec_of_model, spec_of_state_dict
from automatch.transforms import Adapt, Concat, apply_transform


def trained(seed: int = 0, groups: int = 1) -> tuple[Old, torch.optim.Optimizer]:
    model = old_model(seed)
    parameters = list(model.parameters())
    cuts = torch.linspace(0, len(parameters), groups + 1).int().tolist()
    optimizer = torch.optim.AdamW([{"params": parameters[a:b], "lr": 0.1 * (i + 1)} for i, (a, b) in enumerate(itertools.pairwise(cuts))])
    model(torch.randint(0, 13, (4, 5))).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_a_flattened_optimizer_state_follows(tmp_path: Path) -> None:
    old, optimizer = trained()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model_state, optimizer_state = get_state_dict(old, optimizer, options=options)
    path = save_alone({"app": {"model": model_state, "optim": optimizer_state}}, tmp_path / "flat")
    new = new_model()
    fresh = torch.optim.AdamW(new.parameters())
    state = {"model": new.state_dict(), "optim": get_optimizer_state_dict(new, fresh, options=options)}
    load(state, path, mapping_of(Old(), New()))
    for match in matches():
        key, sources = f"state.{match.target}.exp_avg", [f"state.{source}.exp_avg" for source in match.sources]
        if key in state["optim"]:
            assert torch.equal(state["optim"][key], apply_transform(match.transform, [optimizer_state[source] for source in sources]))
            assert state["optim"][f"param_groups.{match.target}.lr"] == 0.1


def test_sources_of_one_parameter_must_have_taken_equally_many_steps(tmp_path: Path) -> None:
    old, optimizer = trained()
    optimizer.state[old.layers[0].key.weight]["step"] += 1
    state = dict(zip(("model", "optim"), get_state_dict(old, optimizer), strict=True))
    path = save_alone(state, tmp_path / "uneven")
    new = new_model()
    fresh = torch.optim.AdamW(new.parameters())
    message = r"sources of 'optim.state.blocks.0.qkv.weight.step' differ.*query.weight.step = 1.0, .*key.weight.step = 2.0"
    with pytest.raises(LoadError, match=message):
        load(new, path, mapping_of(Old(), New()), optimizer=fresh)
    assert not fresh.state


def test_a_group_that_draws_from_two_is_refused(tmp_path: Path) -> None:
    old, optimizer = trained(groups=2)
    state = dict(zip(("model", "optim"), get_state_dict(old, optimizer), strict=True))
    path = save_alone(state, tmp_path / "groups")
    new = new_model()
    with pytest.raises(LoadError, match=r"parameter group 0 of the optimizer takes parameters of the checkpoint's groups \[0, 1\]"):
        load(new, path, mapping_of(Old(), New()), optimizer=torch.optim.AdamW(new.parameters()))


def test_an_optimizer_without_saved_state_is_refused(tmp_path: Path) -> None:
    path = save_alone({"model": old_model().state_dict()}, tmp_path / "bare")
    new = new_model()
    before = {key: value.clone() for key, value in new.state_dict().items()}
    with pytest.raises(LoadError, match=r"nothing in the checkpoint feeds \d+ entries: 'optim.state.*load the model without its optimizer"):
        load(new, path, mapping_of(Old(), New()), optimizer=torch.optim.AdamW(new.parameters()))
    for key, value in new.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_optimizer_that_holds_state_gets_it_back_when_loading_fails(tmp_path: Path) -> None:
    old, optimizer = trained()
    state = dict(zip(("model", "optim"), get_state_dict(old, optimizer), strict=True))
    path = save_alone(state, tmp_path / "old")
    mapping = mapping_of(Old(), Old(), [Match(k, (k,), decided=True) for k in Old().state_dict() if k != "head.weight"])
    mapping = mapping.decide("head.weight", "layers.0.query.weight")
    with pytest.raises(LoadError, match=r"size mismatch for 'model\.head\.weight'"):
        load(old, path, mapping, optimizer=optimizer)
    assert all(entry["step"] == 1 for entry in optimizer.state.values())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_stay_tied(tmp_path: Path, meta: bool) -> None:
    value = torch.randn(5, 4)
    path = save_alone({"tokens": value}, tmp_path / "tied")
    with torch.device("meta" if meta else "cpu"):
        model = Tied()
    mapping = KeyMapping(Side.of(spec_of_state_dict({"tokens": value})), Side.of(spec_of_model(model)), ())
    load(model, path, mapping.with_matches([Match("embed.weight", ("tokens",), decided=True)]))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, value)


def test_tied_weights_with_two_values_are_refused(tmp_path: Path) -> None:
    state = {"a": torch.randn(5, 4), "b": torch.randn(5, 4)}
    path = save_alone(dict(state), tmp_path / "two")
    model = Tied()
    mapping = KeyMapping(Side.of(spec_of_state_dict(state)), Side.of(spec_of_model(model)), ())
    mapping = mapping.with_matches([Match("embed.weight", ("a",), decided=True), Match("head.weight", ("b",), decided=True)])
    with pytest.raises(LoadError, match="are one tensor in the model, and the checkpoint feeds them different values"):
        load(model, path, mapping)


def test_a_state_dict_with_tied_weights_is_no_exception(tmp_path: Path) -> None:
    state = {"a": torch.randn(5, 4), "b": torch.randn(5, 4)}
    path = save_alone(dict(state), tmp_path / "two")
    target = dict(Tied().state_dict())
    mapping = KeyMapping(Side.of(spec_of_state_dict(state)), Side.of(spec_of_state_dict(target)), ())
    mapping = mapping.with_matches([Match("embed.weight", ("a",), decided=True), Match("head.weight", ("b",), decided=True)])
    with pytest.raises(LoadError, match="are one tensor in the model"):
        load(target, path, mapping)


class Counting(nn.Linear):
    """A layer with extra state, which is an object."""

    calls = 0

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_extra_state_follows_its_module(tmp_path: Path) -> None:
    old, new = nn.ModuleDict({"first": Counting(2, 2)}), nn.ModuleDict({"renamed": Counting(2, 2)})
    old["first"].calls = 7
    path = save_alone(old.state_dict(), tmp_path / "extra")
    found = [Match(f"renamed.{leaf}", (f"first.{leaf}",), decided=True) for leaf in ("weight", "bias")]
    load(new, path, mapping_of(old, new, found))
    assert new["renamed"].calls == 7
    assert torch.equal(new["renamed"].weight, old["first"].weight)


def test_strict_refuses_and_pins_accept(tmp_path: Path) -> None:
    path = save_alone({"model": old_model().state_dict()}, tmp_path / "old")
    mapping = mapping_of(Old(), New(), matches()[1:])
    model = new_model()
    with pytest.raises(LoadError, match="1 of 30 tensors of the model would keep their initial values"):
        load(model, path, mapping)
    kept = model.tokens.weight.clone()
    report = load(model, path, mapping, pins={"tokens.weight": None})
    assert report.missing_keys == ("tokens.weight",)
    assert report.unexpected_keys == ("embed.weight",)
    assert torch.equal(model.tokens.weight, kept)
    load(model, path, mapping, pins={"tokens.weight": "embed.weight"})
    assert torch.equal(model.tokens.weight, old_model().embed.weight)


def test_unsure_matches_are_withheld(tmp_path: Path) -> None:
    path = save_alone({"model": old_model().state_dict()}, tmp_path / "old")
    unsure = [Match(m.target, m.sources, m.transform, confidence=0.5) for m in matches()]
    with pytest.raises(LoadError, match=r"withheld, best is .* with confidence 0.50 < 0.95"):
        load(new_model(), path, mapping_of(Old(), New(), unsure))
    assert len(load(new_model(), path, mapping_of(Old(), New(), unsure), threshold=0.4).loaded) == 30


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            Match("lm_head.weight", ("layers.0.query.weight",), decided=True),
            r"size mismatch for 'model.lm_head.weight': checkpoint \(16, 16\)",
        ),
        (
            Match("lm_head.weight", ("head.weight", "stats.weight"), Concat(0), decided=True),
            "what feeds 'model.lm_head.weight' does not fit",
        ),
        (Match("lm_head.weight", ("head.weight",), Adapt("resize", (13, 16)), decided=True), "invents or drops values"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, found: Match, message: str) -> None:
    path = save_alone({"model": old_model().state_dict()}, tmp_path / "old")
    others = [match for match in matches() if match.target != "lm_head.weight"]
    with pytest.raises(LoadError, match=message):
        load(new_model(), path, mapping_of(Old(), New(), [*others, found]))


def test_a_mapping_of_something_else_is_refused(tmp_path: Path) -> None:
    path = save_alone({"model": old_model().state_dict()}, tmp_path / "old")
    with pytest.raises(MappingError, match="is not a key of the checkpoint; the mapping was made for another one"):
        load(new_model(), path, mapping_of(New(), New(), [Match(k, (k,), decided=True) for k in New().state_dict()]))
    with pytest.raises(MappingError, match="model"):
        load(old_model(), path, mapping_of(Old(), New()))
    with pytest.raises(MappingError, match="cannot read mapping"):
        load(new_model(), path, tmp_path / "no.json")


def test_targets_that_cannot_be_all_or_nothing_are_refused(tmp_path: Path) -> None:
    path = save_alone({"model": old_model().state_dict()}, tmp_path / "old")
    with pytest.raises(ModelError, match="entry 'app' is Old, which may fail half way"):
        load({"app": old_model()}, path)
    with torch.device("meta"):
        model = New()
    with pytest.raises(ModelError, match="load the model first, then build its optimizer"):
        load(model, path, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(ModelError, match="cannot load into dict with an optimizer"):
        load({}, path, optimizer=torch.optim.AdamW(new_model().parameters()))


def test_the_planner_refuses_what_nothing_feeds(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    path = save_alone({"model": old_model().state_dict()}, tmp_path / "old")
    planner = MappedLoadPlanner(mapping_of(Old(), New(), matches()[1:]))
    with pytest.raises(LoadError, match=r"nothing in the checkpoint feeds 1 entries: 'tokens\.weight'"):
        planner.set_up_planner(dict(new_model().state_dict()), FileSystemReader(path).read_metadata())


def test_a_checkpoint_with_two_models_is_told_apart_by_the_mapping(tmp_path: Path) -> None:
    state = {"model": old_model(0).state_dict(), "ema": old_model(3).state_dict()}
    path = save_alone(state, tmp_path / "two")
    model = new_model()
    load(model, path, mapping_of(Old(), New()))
    assert torch.equal(model.tokens.weight, old_model(0).embed.weight)


def test_a_proposal_loads_what_was_only_renamed(tmp_path: Path) -> None:
    """Without a mapping, one is proposed from metadata."""
    old, new = nn.ModuleDict({"encoder": Old()}), nn.ModuleDict({"backbone": Old()})
    path = save_alone({"model": old.state_dict()}, tmp_path / "old")
    load(new, path)
    for (_, a), (_, b) in zip(old.state_dict().items(), new.state_dict().items(), strict=True):
        assert torch.equal(a, b)
